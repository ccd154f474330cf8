"""Random numbers that are independent of the global random state and do not change it.

`generator` returns a keyed generator on the CPU, for example for the order of images. `KeyedRandom` generates numbers
per image on the image's device. With torch's generators, the numbers of an image depend on the images before it, the
batch size and the device. Here every number is a hash of its key and position (splitmix64 on 64-bit integers), so the
integers are the same in every batch and on every device. Philox would work too, but is several times slower without its
own kernel.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Position of a batch in a larger one that is split over processes or into micro-batches.

    Each image gets the random numbers that it would have in the larger batch.
    """

    rows: Tensor
    """Rows of the images in the larger batch [B], on the CPU."""
    total: int
    """Number of images in the larger batch."""


def fraction_of(place: Place, fraction: float, step: int) -> tuple[Tensor, Place]:
    """Choose an evenly spaced fraction of the larger batch, and return which images at `place` are in it.

    The choice does not depend on how the batch is split. If the fraction is less than one image, some steps have one
    image and others none. Otherwise every step has the same rows, so that a CUDA graph can be replayed.

    Returns:
        positions of the chosen images [k], and their place.
    """
    rows = place.rows.double() + (step * place.total if place.total * fraction < 1 else 0)
    chosen = ((rows + 1) * fraction).floor() > (rows * fraction).floor()
    positions = chosen.nonzero().flatten()
    return positions, Place(place.rows[positions], place.total)


def generator(*key: int) -> torch.Generator:
    """A CPU generator keyed by integers such as (seed, step). Nearby keys give unrelated streams."""
    state = 0
    for part in key:
        # splitmix64: the finaliser spreads every bit of the key over the whole word
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def carried(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to another device; through pinned memory, so that the host does not wait for a GPU."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=device.type != "cpu")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # splitmix64: increment and the two multipliers of its finaliser
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_CACHED_WORDS = 1 << 16
"""Number of words that a CPU hashes at once, so that they stay in its cache."""


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
    """Random numbers for a batch of images.

    Successive draws are independent; a new object with the same arguments repeats them. The numbers of an image depend
    only on seed, purpose and its index, not on the batch, the device or the process. No global state is read or
    changed, and the host does not wait for the device.

    Args:
        seed: seed of the experiment.
        purpose: use of the numbers ("shot_noise/3"); different purposes are independent.
        indices: [B] integers that identify the images; numbers are generated on their device.
    """

    def __init__(self, seed: int, purpose: str, indices: Tensor) -> None:
        digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
        base = int.from_bytes(digest, "little", signed=True)
        self._keys = _mix(_mix(indices.to(torch.int64) * _GOLDEN + _GOLDEN) ^ base)  # [B]
        self._draws = 0
        self.batch = len(indices)
        self.device = indices.device

    def _words(self, count: int) -> Tensor:
        """Hashes of a new draw [B, count]."""
        self._draws += 1
        keys = _mix(self._keys + _signed(self._draws * _GOLDEN % (1 << 64)))  # [B], one stream per draw
        position = torch.arange(1, count + 1, device=keys.device) * _GOLDEN  # [count]
        words = torch.empty(self.batch, count, dtype=torch.int64, device=keys.device)
        at_once = _CACHED_WORDS // max(count, 1) if keys.device.type == "cpu" else self.batch
        for own, part in zip(keys.split(max(at_once, 1)), words.split(max(at_once, 1)), strict=True):
            _mix(torch.add(own.unsqueeze(1), position, out=part))
        return words

    def _bits(self, shape: Sequence[int]) -> Tensor:
        return self._words(math.prod(shape)).view(self.batch, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] float32, uniform on the open interval (0, 1): multiples of 2^-23, centred, so never 0 or 1."""
        return _open_unit(_shifted(self._bits(shape), 41))

    def symmetric(self, *shape: int, limit: float = 1.0) -> Tensor:
        """[B, *shape] float32, uniform on [-limit, limit]; the same bits on every device. Faster than `uniform`: two
        numbers per hash."""
        count = math.prod(shape)
        halves = self._words((count + 1) // 2).view(torch.int32)[:, :count]
        return halves.to(torch.float32).mul_(limit * 2.0**-31).view(self.batch, *shape)

    def integers(self, below: int) -> Tensor:
        """[B] int64, uniform on 0 .. below - 1, for `below` up to 2^31."""
        return (_shifted(self._bits(()), 32) * below) >> 32

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] float32, standard normal (Box-Muller; cut at 5.8 standard deviations by the 23 bits). Devices
        differ by rounding at most."""
        bits = self._bits(shape)
        radius = _open_unit(_shifted(bits, 41)).log_().mul_(-2).sqrt_()
        angle = _open_unit(bits & ((1 << 23) - 1)).mul_(2 * math.pi)
        return radius.mul_(angle.cos_())


def _open_unit(integers: Tensor) -> Tensor:
    """Map 0 .. 2^23 - 1 to the middle of its cell in (0, 1); exact in float32."""
    return integers.float().add_(0.5).mul_(2.0**-23)


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the global generators of torch (CPU), Python and (if imported) NumPy after the block.

    Iterating a DataLoader draws from them, and so do transforms in the main process.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy and numpy_state:
                numpy.random.set_state(numpy_state)
