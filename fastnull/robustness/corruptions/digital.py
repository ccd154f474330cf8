"""Digital corruptions of ImageNet-C: contrast, saturate, elastic transform, pixelate, JPEG."""

from __future__ import annotations

import functools
import io

import torch
from torch import Tensor

from fastnull.rng import KeyedRandom
from fastnull.robustness.corruptions.base import (
    BLACK,
    check_rgb,
    gaussian_filter,
    sample_linear,
    separable,
)


def contrast(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """(x - mean) c + mean, with the mean of each channel of the image."""
    c = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * c + mean


def saturate(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Saturation S of HSV → S c0 + c1 within [0, 1].

    With V the largest channel and S = (V - smallest) / V, the distance of a channel to V is multiplied by S' / S. Gray
    pixels have hue 0, so c1 > 0 turns them red, as in the original.
    """
    check_rgb(images, "saturate")
    factor, offset = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    saturation = (chroma / value.clamp_min(BLACK) * factor + offset).clamp(0, 1)
    coloured = value - (value - images) * (saturation * value / chroma.clamp_min(BLACK))
    gray = value * torch.cat([torch.ones_like(value), (1 - saturation).expand(-1, 2, -1, -1)], 1)
    return torch.where(chroma > BLACK, coloured, gray)


def elastic_transform(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Affine map of three points moved by U(-c2, c2), then shifts of c0 Gaussian(U(-1, 1), c1), in units of 244 px."""
    units = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))[severity - 1]
    amplitude, sigma, jitter = (244 * unit for unit in units)
    height, width = images.shape[2:]
    # points are (x, y); the original takes the centre as (height, width)
    centre = torch.tensor([height // 2, width // 2], dtype=torch.float64)
    reach = min(height, width) // 3
    before = centre + torch.tensor([[reach, reach], [reach, -reach], [-reach, -reach]], dtype=torch.float64)  # [3, 2]
    before = before.to(images.device)
    after = before + (2 * random.uniform(3, 2).double() - 1) * jitter  # [B, 3, 2]
    # the map back from `after` to `before`, by barycentric coordinates: p = after0 + edges · (s, t)
    edges_after = (after[:, 1:] - after[:, :1]).mT  # [B, 2, 2], edges in columns
    edges_before = (before[1:] - before[:1]).mT
    back = edges_before @ torch.linalg.pinv(edges_after)  # pinv: points in a line must not raise
    rows, columns = torch.meshgrid(
        torch.arange(height, device=images.device, dtype=torch.float64),
        torch.arange(width, device=images.device, dtype=torch.float64),
        indexing="ij",
    )
    pixels = torch.stack([columns, rows]).flatten(1)  # [2, H W]
    source = back @ (pixels - after[:, 0, :, None]) + before[0, :, None]  # [B, 2, H W]
    x, y = source.unflatten(2, (height, width)).unbind(1)
    warped = sample_linear(images, y.float(), x.float(), "reflect101")
    field = gaussian_filter(2 * random.uniform(2, height, width) - 1, sigma, "reflect", truncate=3) * amplitude
    return sample_linear(warped, rows.float() + field[:, 1], columns.float() + field[:, 0], "reflect")


@functools.lru_cache(maxsize=64)
def box_matrix(size: int, target: int) -> Tensor:
    """[target, size] matrix of a box resize: the mean of the whole pixels nearest to each output (as Pillow's BOX)."""
    ratio = size / target
    support = max(ratio, 1) / 2
    matrix = torch.zeros(target, size)
    for output in range(target):
        centre = (output + 0.5) * ratio
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        matrix[output, first:last] = 1 / (last - first)
    return matrix


def pixelate(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Box resize to a fraction c of each side, and back; both are linear, so one matrix per axis does both."""
    c = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    rows, columns = (box_matrix(int(size * c), size) @ box_matrix(size, int(size * c)) for size in images.shape[2:])
    return separable(images, rows, columns)


def jpeg_compression(images: Tensor, severity: int, random: KeyedRandom) -> Tensor:
    """Through a JPEG file in memory, image by image on the CPU (needs Pillow); pixels are rounded to 8 bits."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"jpeg_compression needs Pillow (pip install pillow): {error}") from error
    if images.shape[1] not in (1, 3):
        raise ValueError(f"jpeg_compression needs 1 or 3 channels; got {images.shape[1]}")
    quality = (25, 18, 15, 10, 7)[severity - 1]
    bytes_ = images.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, C]
    results = []
    for pixels in bytes_:
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
        with Image.open(file) as opened:
            decoded = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8)
        results.append(decoded.view(pixels.shape).permute(2, 0, 1))
    return torch.stack(results).to(images.device).float().div(255)
