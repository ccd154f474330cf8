"""Random numbers of an image that depend on (seed, purpose, index of the image) alone.

torch's generators are streams: what an image gets depends on the images before it, on the batch size and the device.
Here every number is a hash of its address (splitmix64 over 64-bit integers), so the integers behind them are the same
in every batch and on every device; normals then differ by rounding at most. No global state is read or changed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # splitmix64: increment and the two multipliers of its finaliser
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, in place; products wrap."""
    bits ^= _shifted(bits, 30)
    bits *= _FIRST
    bits ^= _shifted(bits, 27)
    bits *= _SECOND
    bits ^= _shifted(bits, 31)
    return bits


class KeyedRandom:
    """A source of random numbers for a batch of images; every draw is fresh, and a new source repeats them.

    Args:
        seed: of the experiment.
        purpose: what the numbers are for, so that two uses of a seed are independent ("shot_noise/3").
        indices: [B] integers that identify the images; the numbers come on its device.
    """

    def __init__(self, seed: int, purpose: str, indices: Tensor) -> None:
        digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
        base = int.from_bytes(digest, "little", signed=True)
        self._keys = _mix(_mix(indices.to(torch.int64) * _GOLDEN + _GOLDEN) ^ base)  # [B]
        self._draws = 0
        self.batch = len(indices)
        self.device = indices.device

    def _bits(self, shape: Sequence[int]) -> Tensor:
        self._draws += 1
        keys = _mix(self._keys + _signed(self._draws * _GOLDEN % (1 << 64)))  # [B], one stream a draw
        count = math.prod(shape)
        position = torch.arange(1, count + 1, device=keys.device) * _GOLDEN  # [count]
        return _mix(keys[:, None] + position).view(len(keys), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] float32, uniform on the open interval (0, 1): multiples of 2^-23, centred, so never 0 or 1."""
        return _open_unit(_shifted(self._bits(shape), 41))

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] float32, standard normal (Box-Muller; cut at 5.8 standard deviations by the 23 bits)."""
        bits = self._bits(shape)
        radius = _open_unit(_shifted(bits, 41)).log_().mul_(-2).sqrt_()
        angle = _open_unit(bits & ((1 << 23) - 1)).mul_(2 * math.pi)
        return radius.mul_(angle.cos_())


def _open_unit(integers: Tensor) -> Tensor:
    """0 .. 2^23 - 1 → the middle of its cell of (0, 1); exact in float32."""
    return integers.float().add_(0.5).mul_(2.0**-23)
