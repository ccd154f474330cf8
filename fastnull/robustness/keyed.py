"""Random numbers that depend only on (seed, purpose, index of the image).

With torch's generators an image's numbers depend on the images before it, the batch size and the device. Here every
number is a hash of its address (splitmix64 on 64-bit integers), so the integers are the same in every batch and on
every device, and normal numbers differ by rounding at most. No global state is read or changed.
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
    """Random numbers for a batch of images. Every draw is new; another object with the same arguments repeats them.

    Args:
        seed: of the experiment.
        purpose: use of the numbers ("shot_noise/3"); different purposes are independent.
        indices: [B] integers that identify the images; the numbers are on its device.
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
        keys = _mix(self._keys + _signed(self._draws * _GOLDEN % (1 << 64)))  # [B], one stream per draw
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
