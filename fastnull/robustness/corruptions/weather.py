"""Weather of ImageNet-C: snow, fog, brightness."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.robustness.corruptions.base import BLACK, check_rgb, motion_filter, zoom
from fastnull.robustness.keyed import KeyedRandom


def snow(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Flakes (mean, std, zoom, threshold), smeared (radius, sigma), over the whitened image (share of the original)."""
    check_rgb(images, "snow")
    mean, std, factor, threshold, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    flakes = zoom(mean + std * random.normal(1, *images.shape[2:]), factor)  # [B, 1, H, W]
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = motion_filter(flakes, radius, sigma, random.uniform() * 90 - 135)
    gray = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    whitened = share * images + (1 - share) * torch.maximum(images, 1.5 * gray + 0.5)
    return whitened + flakes + flakes.rot90(2, (2, 3))


def fog(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """x + c plasma, scaled so that the image's largest value stays."""
    c, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    height, width = images.shape[2:]
    size = max(256, 1 << (max(height, width) - 1).bit_length())
    haze = plasma(size, decay, random)[:, None, :height, :width]
    largest = images.amax((1, 2, 3), keepdim=True)
    return (images + c * haze) * largest / (largest + c)


def plasma(size: int, decay: float, random: KeyedRandom) -> Tensor:
    """Diamond-square clouds on a torus, [B, size, size] within [0, 1]; size is a power of two.

    Every new point is the mean of its four neighbours plus U(-w², w²), w = 100 on the coarsest grid and divided by
    `decay` on each finer one.
    """
    cloud = torch.zeros(random.batch, 1, 1, dtype=torch.float64, device=random.device)  # the coarsest grid: one point
    wibble = 100.0
    step = size
    while step >= 2:
        right, below = cloud.roll(-1, 2), cloud.roll(-1, 1)
        middle = _wibbled(cloud + below + right + below.roll(-1, 2), wibble, random)
        top = _wibbled(middle + middle.roll(1, 1) + cloud + right, wibble, random)
        left = _wibbled(middle + middle.roll(1, 2) + cloud + below, wibble, random)
        # interleave into the grid of half the step: [cloud top / left middle]
        upper, lower = torch.stack([cloud, top], 3), torch.stack([left, middle], 3)  # [B, points, points, 2]
        cloud = torch.stack([upper, lower], 2).flatten(3).flatten(1, 2)  # [B, 2 points, 2 points]
        step //= 2
        wibble /= decay
    cloud = cloud - cloud.amin((1, 2), keepdim=True)
    return (cloud / cloud.amax((1, 2), keepdim=True)).float()


def _wibbled(total: Tensor, wibble: float, random: KeyedRandom) -> Tensor:
    return total / 4 + wibble**2 * (2 * random.uniform(*total.shape[1:]).double() - 1)


def brightness(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Value of HSV + c, cut at 1. With V the largest channel that is a factor of V' / V on every channel."""
    c = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = images.amax(1, keepdim=True)
    brighter = (value + c).clamp(max=1)
    # a black pixel has no colour: it becomes gray
    return torch.where(value > BLACK, images * (brighter / value.clamp_min(BLACK)), brighter)
