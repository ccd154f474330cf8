"""Random numbers that do not depend on, and do not disturb, the caller's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where the images of a batch lie in a larger one, which is split over processes or taken in parts.

    What is drawn for an image is then what it would get in the larger batch.
    """

    rows: Tensor
    """[B], on the CPU."""
    total: int
    """Images of the larger batch."""


def fraction_of(place: Place, fraction: float, step: int) -> tuple[Tensor, Place]:
    """Choose a fraction of the larger batch, at even distances; return which of the images at a place are in it.

    The choice is the same however the batch is divided. Where the fraction is less than one image, some steps have one
    and others none, by `step`; else it is the same rows in every step, as many as a graph was captured for.

    Returns:
        positions among the images at the place [k], and the place of those.
    """
    rows = place.rows.double() + (step * place.total if place.total * fraction < 1 else 0)
    chosen = ((rows + 1) * fraction).floor() > (rows * fraction).floor()
    positions = chosen.nonzero().flatten()
    return positions, Place(place.rows[positions], place.total)


def generator(*key: int) -> torch.Generator:
    """A CPU generator keyed by integers such as (seed, step); nearby keys give unrelated streams."""
    state = 0
    for part in key:
        # splitmix64: the finaliser spreads every bit of the key over the whole word
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def carried(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; from pinned memory, so that the host does not wait until a GPU has it."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=device.type != "cpu")


def uniform(shape: Sequence[int], limit: float, source: torch.Generator, like: Tensor) -> Tensor:
    """U(−limit, limit) of `shape`, drawn on the CPU so that every device gets the same noise, then moved.

    float64 where `like` is, float32 otherwise: noise is optimised in at least float32.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    drawn = torch.rand(tuple(shape), generator=source, dtype=dtype)
    return carried((2 * drawn - 1) * limit, like.device)


@contextmanager
def preserved() -> Iterator[None]:
    """torch's CPU, Python's and (where loaded) NumPy's global generators are after the block as they were before it.

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
