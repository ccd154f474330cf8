"""Blurs of ImageNet-C: Gaussian, defocus, glass, motion, zoom."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnull.rng import KeyedRandom
from fastnull.robustness.corruptions.base import border, gaussian_filter, gaussian_matrix, motion_filter, zoom

ZOOMS = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))
"""Step and number of zoom factors from 1 upwards; the first range includes 1.11, as numpy's rounding had it."""


def gaussian_blur(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Gaussian filter, sigma in pixels."""
    return gaussian_filter(images, (1, 2, 3, 4, 6)[severity - 1])


def disk(radius: int, sigma: float) -> Tensor:
    """A disk with softened edge, [2 r + 1, 2 r + 1] with r = max(8, radius), float64, of sum about 1."""
    reach = max(8, radius)
    squares = torch.arange(-reach, reach + 1).square()
    flat = (squares[:, None] + squares <= radius**2).double()
    soft_radius = 1 if radius <= 8 else 2  # a 3 x 3 or 5 x 5 filter
    size = 2 * reach + 1
    soft = gaussian_matrix(size, sigma, "reflect101", soft_radius / sigma).double()
    return soft @ (flat / flat.sum()) @ soft.T


def defocus_blur(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Mean over a disk of (radius, softness of its edge) pixels, mirrored at the border."""
    kernel = disk(*((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]).to(images)
    batch, channels, height, width = images.shape
    reach = kernel.shape[0] // 2
    rows = border(torch.arange(-reach, height + reach, device=images.device), height, "reflect101")
    columns = border(torch.arange(-reach, width + reach, device=images.device), width, "reflect101")
    padded = images[:, :, rows[:, None], columns].reshape(batch * channels, 1, height + 2 * reach, width + 2 * reach)
    return F.conv2d(padded, kernel[None, None]).view_as(images)


def glass_blur(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Blur, rounding down to 8 bits, pixels replaced by random neighbours (sigma, reach, rounds), blur.

    The original intends to swap neighbours, but its numpy views copy them; this function copies too.
    """
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    batch, _, height, width = images.shape
    source = torch.arange(height * width, device=images.device).expand(batch, -1)
    for _ in range(rounds):
        source = source.gather(1, _copies(random, height, width, reach))
    blurred = gaussian_filter(images, sigma).mul(255).floor().div(255)
    shuffled = blurred.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    return gaussian_filter(shuffled, sigma)


def _copies(random: KeyedRandom, height: int, width: int, reach: int) -> Tensor:
    """[B, H W]: the source of each pixel after a round of copies, last pixel first, from offsets -reach..reach-1.

    A pixel that was overwritten earlier in the round (a later one in memory) is copied with its new content. So every
    pixel points to the new or the old state of another one, and pointer doubling replaces the loop over pixels.
    """
    offsets = (random.uniform(2, height, width) * (2 * reach)).long() - reach  # [B, 2, H, W]
    device = offsets.device
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    moved = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)  # [H, W]
    count = height * width
    place = torch.arange(count, device=device)
    target = ((rows + offsets[:, 0]) * width + columns + offsets[:, 1]).flatten(1)  # [B, H W], meaningful where moved
    moved = moved.flatten()
    target = torch.where(moved, target, place)
    # states 0 .. count-1 are new, count .. 2 count - 1 old; old states point to themselves
    renewed = target > place  # a pixel that never moves keeps its old state
    pointer = torch.cat([torch.where(renewed, target, target + count), (place + count).expand_as(target)], 1)
    for _ in range(count.bit_length()):
        pointer = pointer.gather(1, pointer)
    return pointer[:, :count] - count


def motion_blur(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Smear of (radius, sigma) pixels along an angle from U(-45, 45) degrees."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return motion_filter(images, radius, sigma, random.uniform() * 90 - 45)


def zoom_blur(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Mean of the image and its enlargements."""
    step, count = ZOOMS[severity - 1]
    total = images.clone()
    for k in range(count):
        total += zoom(images, 1 + k * step)
    return total / (count + 1)
