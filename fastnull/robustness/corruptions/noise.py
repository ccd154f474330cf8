"""Noise of ImageNet-C: Gaussian, shot, impulse, speckle; independent for every value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastnull.rng import KeyedRandom


def gaussian_noise(images: Tensor, c: Any, random: KeyedRandom) -> Tensor:
    """x + N(0, c)."""
    return images + c * random.normal(*images.shape[1:])


def shot_noise(images: Tensor, c: Any, random: KeyedRandom) -> Tensor:
    """Poisson(x c) / c."""
    return poisson(images * c, random.uniform(*images.shape[1:]), largest_rate=c) / c


def impulse_noise(images: Tensor, c: Any, random: KeyedRandom) -> Tensor:
    """Salt and pepper: a fraction c of the values becomes 0 or 1, with equal probability."""
    shape = images.shape[1:]
    flipped, salt = random.uniform(*shape) <= c, random.uniform(*shape) <= 0.5
    return torch.where(flipped, salt.to(images), images)


def speckle_noise(images: Tensor, c: Any, random: KeyedRandom) -> Tensor:
    """x + x N(0, c)."""
    return images + images * (c * random.normal(*images.shape[1:]))


def poisson(rate: Tensor, uniform: Tensor, largest_rate: float) -> Tensor:
    """Poisson counts with the given rates (0 .. largest_rate), by inversion of the distribution function.

    rate, uniform: any equal shapes; returns the counts as floats. There is one uniform number per count, so the
    result is as reproducible as the uniform numbers; that of torch.poisson is not.
    """
    if largest_rate > 80:
        rate = rate.double()  # float32 has no exp(-rate) below 1e-38
    term = torch.exp(-rate)  # P(count = k), k = 0, 1, …
    total = term.clone()
    count = torch.zeros_like(rate)
    # 23 random bits cannot exceed this count: their quantile 1 - 2^-24 is 5.3 standard deviations above the mean
    for k in range(1, math.ceil(largest_rate + 5.5 * math.sqrt(largest_rate) + 6) + 1):
        count += uniform > total
        term *= rate / k
        total += term
    # float32 sums can end just below 1, and the largest uniform numbers would never stop counting
    return torch.minimum(count, (rate + 5.5 * rate.sqrt() + 6).floor()).to(uniform.dtype)
