"""Noise of ImageNet-C: Gaussian, shot, impulse, speckle; independent for every value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnull.rng import KeyedRandom


def gaussian_noise(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """x + N(0, c)."""
    c = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return images + c * random.normal(*images.shape[1:])


def shot_noise(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Poisson(x c) / c."""
    c = (60, 25, 12, 5, 3)[severity - 1]
    return poisson(images * c, random.uniform(*images.shape[1:]), largest_rate=c) / c


def impulse_noise(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Salt and pepper: a fraction c of the values becomes 0 or 1, with equal probability."""
    c = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    shape = images.shape[1:]
    flipped, salt = random.uniform(*shape) <= c, random.uniform(*shape) <= 0.5
    return torch.where(flipped, salt.to(images), images)


def speckle_noise(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """x + x N(0, c)."""
    c = (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]
    return images + images * (c * random.normal(*images.shape[1:]))


def poisson(rate: Tensor, uniform: Tensor, largest_rate: float) -> Tensor:
    """Poisson counts with the given rates (0 .. largest_rate), by inversion of the distribution function.

    rate, uniform: any equal shapes; returns the counts as floats. There is one uniform number per count, so the
    result is as reproducible as the uniform numbers; that of torch.poisson is not.
    """
    term = torch.exp(-rate)  # P(count = k), k = 0, 1, …
    total = term.clone()
    count = torch.zeros_like(rate)
    # 23 random bits cannot exceed this count: their quantile 1 - 2^-24 is 5.3 standard deviations above the mean
    for k in range(1, math.ceil(largest_rate + 5.5 * math.sqrt(largest_rate) + 6) + 1):
        count += uniform > total
        term *= rate / k
        total += term
    # float32 sums can end just below 1, and the largest uniform numbers would never stop counting
    return torch.minimum(count, (rate + 5.5 * rate.sqrt() + 6).floor())
