"""Weather of ImageNet-C: snow, fog, brightness, spatter."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.rng import KeyedRandom
from fastnull.robustness.corruptions.base import BLACK, LUMINANCE, check_rgb, gaussian_filter, motion_filter, zoom


def snow(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Flakes (mean, std, zoom, threshold), smeared (radius, sigma), over the whitened image (weight of the image)."""
    check_rgb(images, "snow")
    mean, std, factor, threshold, radius, sigma, weight = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    flakes = zoom(mean + std * random.normal(1, *images.shape[2:]), factor)  # [B, 1, H, W]
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = motion_filter(flakes, radius, sigma, random.uniform() * 90 - 135)
    gray = (images * images.new_tensor(LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
    whitened = weight * images + (1 - weight) * torch.maximum(images, 1.5 * gray + 0.5)
    return whitened + flakes + flakes.rot90(2, (2, 3))


def fog(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """x + c plasma, scaled to keep the image's largest value."""
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
    """Value of HSV + c, clamped at 1: with V the largest channel, every channel times V' / V."""
    c = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = images.amax(1, keepdim=True)
    brighter = (value + c).clamp(max=1)
    # a black pixel has no colour: it becomes gray
    return torch.where(value > BLACK, images * (brighter / value.clamp_min(BLACK)), brighter)


def spatter(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Drops of (mean, std, sigma, threshold, strength): of water up to severity 3, then of mud."""
    check_rgb(images, "spatter")
    mean, std, sigma, threshold, strength = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[severity - 1]
    liquid = gaussian_filter(mean + std * random.normal(1, *images.shape[2:]), sigma)  # [B, 1, H, W]
    liquid = torch.where(liquid < threshold, 0, liquid)
    if severity <= 3:
        drops = _water(liquid[:, 0])[:, None]
        drops = strength * drops / drops.amax((1, 2, 3), keepdim=True).clamp_min(BLACK)
        return images + drops * images.new_tensor([175, 238, 238]).view(3, 1, 1) / 255
    cover = gaussian_filter((liquid > threshold).to(images), strength)
    cover = torch.where(cover < 0.8, 0, cover)
    return images * (1 - cover) + cover * images.new_tensor([63, 42, 20]).view(3, 1, 1) / 255


def _water(liquid: Tensor) -> Tensor:
    """Liquid [B, H, W], darker towards its rims and lit from below right; by OpenCV, image by image on the CPU."""
    try:
        import cv2
        import numpy as np
    except ImportError as error:
        raise ImportError(f"spatter needs OpenCV (pip install opencv-python-headless): {error}") from error
    relief = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    results = []
    for layer in liquid.mul(255).clamp(0, 255).byte().cpu().numpy():
        distance = cv2.distanceTransform(255 - cv2.Canny(layer, 50, 150), cv2.DIST_L2, 5)
        distance = cv2.threshold(distance, 20, 20, cv2.THRESH_TRUNC)[1]
        distance = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
        shaded = cv2.blur(cv2.filter2D(distance, cv2.CV_8U, relief), (3, 3))
        results.append(torch.from_numpy(layer.astype(np.float32) * shaded.astype(np.float32)))
    return torch.stack(results).to(liquid)
