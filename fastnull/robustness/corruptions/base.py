"""Common parts of the corruptions: border rules, separable filters as matrices, and zoom."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastnull.rng import KeyedRandom

Corruption = Callable[[Tensor, int, KeyedRandom], Tensor]
"""(images [B, C, H, W] float32 in [0, 1], severity 1..5, source of random numbers) → images; the caller clamps."""


LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a colour (ITU-R BT.601)."""

BLACK = 1e-12
"""Values of HSV, and ranges of its channels, up to this count as 0."""


def check_rgb(images: Tensor, name: str) -> None:
    """Raise ValueError unless there are three channels."""
    if images.shape[1] != 3:
        raise ValueError(f"{name} needs 3 channels (RGB); got {images.shape[1]}")


def border(positions: Tensor, size: int, rule: str) -> Tensor:
    """Map integer positions, which may be far outside, to 0 .. size - 1.

    `nearest` repeats the edge, `reflect` mirrors and repeats it (d c b a | a b c d), `reflect101` mirrors around it
    (d c b | a b c d).
    """
    if rule == "nearest":
        return positions.clamp(0, size - 1)
    if rule == "reflect":
        inside = positions.remainder(2 * size)
        return torch.minimum(inside, 2 * size - 1 - inside)
    inside = positions.remainder(2 * size - 2)
    return torch.minimum(inside, 2 * size - 2 - inside)


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a linear map along each axis: rows [H', H] and columns [W', W]; images [..., H, W] → [..., H', W']."""
    return rows.to(images) @ images @ columns.to(images).T


@functools.lru_cache(maxsize=64)
def gaussian_matrix(size: int, sigma: float, rule: str, truncate: float) -> Tensor:
    """[size, size] matrix of a Gaussian filter along one axis, cut at `truncate` standard deviations (as scipy's)."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    sources = border(torch.arange(size)[:, None] + offsets, size, rule)  # [size, 2 radius + 1]
    return matrix.scatter_add_(1, sources, weights.expand(size, -1)).float()


def gaussian_filter(images: Tensor, sigma: float, rule: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian blur of [..., H, W], sigma in pixels; the defaults are scikit-image's."""
    height, width = images.shape[-2:]
    rows, columns = (gaussian_matrix(size, sigma, rule, truncate) for size in (height, width))
    return separable(images, rows, columns)


@functools.lru_cache(maxsize=64)
def zoom_matrix(size: int, factor: float) -> Tensor:
    """[size, size] matrix that enlarges the middle of an axis by `factor`, linearly, corners on corners (as scipy)."""
    crop = math.ceil(size / factor)
    first = (size - crop) // 2
    zoomed = round(crop * factor)
    trim = (zoomed - size) // 2
    # where the kept outputs fall in the crop
    positions = torch.arange(trim, trim + size, dtype=torch.float64) * ((crop - 1) / max(zoomed - 1, 1))
    below = positions.floor().clamp(0, max(crop - 2, 0))
    weight = positions - below
    matrix = torch.zeros(size, size, dtype=torch.float64)
    source = first + below.long()[:, None]
    matrix.scatter_add_(1, source, (1 - weight)[:, None])
    matrix.scatter_add_(1, (source + 1).clamp(max=size - 1), weight[:, None])
    return matrix.float()


def zoom(images: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of [..., H, W] by `factor`; the size stays."""
    height, width = images.shape[-2:]
    return separable(images, zoom_matrix(height, factor), zoom_matrix(width, factor))


def gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images [B, C, H, W] at integer rows and columns, each broadcastable to [B, H', W'] → [B, C, H', W']."""
    width = images.shape[-1]
    rows, columns = torch.broadcast_tensors(rows, columns)
    flat = (rows * width + columns).flatten(1)[:, None]  # [B, 1, H' W']
    values = images.flatten(2).gather(2, flat.expand(-1, images.shape[1], -1))
    return values.unflatten(2, rows.shape[1:])


def sample_linear(images: Tensor, rows: Tensor, columns: Tensor, rule: str) -> Tensor:
    """images [B, C, H, W] at real rows and columns [B, H, W], bilinearly, neighbours outside by the border rule."""
    height, width = images.shape[-2:]
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[:, None], (columns - left)[:, None]  # [B, 1, H, W]
    result = torch.zeros_like(images)
    for row, row_weight in ((0, 1 - down), (1, down)):
        for column, column_weight in ((0, 1 - right), (1, right)):
            values = gather_pixels(
                images, border(top.long() + row, height, rule), border(left.long() + column, width, rule)
            )
            result += values * (row_weight * column_weight)
    return result


def motion_filter(images: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """One-sided Gaussian smear along an angle of each image [B] (ImageMagick's MotionBlurImage), edges repeated."""
    height, width = images.shape[-2:]
    steps = torch.arange(2 * radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (steps.double() / sigma) ** 2)
    weights = (weights / weights.sum()).tolist()
    angle = torch.deg2rad(degrees.double())[:, None]  # [B, 1]
    right = torch.ceil(steps * angle.cos() - 0.5).long()  # [B, 2 radius + 1]
    down = torch.ceil(steps * angle.sin() - 0.5).long()
    every_row = torch.arange(height, device=images.device)
    every_column = torch.arange(width, device=images.device)
    result = torch.zeros_like(images)
    for step, weight in enumerate(weights):
        rows = border(every_row + down[:, step, None], height, "nearest")  # [B, H]
        columns = border(every_column + right[:, step, None], width, "nearest")  # [B, W]
        result += weight * gather_pixels(images, rows[:, :, None], columns[:, None, :])
    return result
