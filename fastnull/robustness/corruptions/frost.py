"""Frost of ImageNet-C: a random part of a picture of frost over the image.

The original's five photographs cannot be shipped. They are replaced by five computed pictures, with the mean and
standard deviation of the colours of frost photographs, or by the pictures in a folder of the user. The protocol of a
result names the pictures.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnull.rng import KeyedRandom
from fastnull.robustness.corruptions.base import LUMINANCE, motion_filter
from fastnull.robustness.corruptions.weather import plasma

MADE_BY_US = "five pictures computed by fastnull, not the original's photographs"

SIDE = 448
CRYSTALS = 60
_COLOURS = (
    # mean and standard deviation of (red, green, blue) in 1/255, about those of frost on glass in five lights
    ((78, 149, 166), (27, 16, 15)),
    ((201, 205, 214), (21, 22, 23)),
    ((138, 153, 165), (28, 28, 30)),
    ((112, 123, 135), (44, 43, 42)),
    ((71, 95, 105), (35, 43, 47)),
)


def frost(images: Tensor, severity: int, random: KeyedRandom, pictures: tuple[Tensor, ...] | None = None) -> Tensor:
    """c0 x + c1 part of a picture, at the picture's own scale; pictures [3, H, W] that are too small are enlarged."""
    weight, strength = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"frost needs 1 or 3 channels; got {channels}")
    pictures = pictures or made_pictures()
    chosen, down, right = random.uniform(3).unbind(1)  # [B]
    parts = []
    for which, y, x in zip(chosen.tolist(), down.tolist(), right.tolist(), strict=True):
        picture = _covering(pictures[int(which * len(pictures))], height, width)
        top, left = int(y * (picture.shape[1] - height + 1)), int(x * (picture.shape[2] - width + 1))
        parts.append(picture[:, top : top + height, left : left + width])
    layer = torch.stack(parts).to(images)
    if channels == 1:
        layer = (layer * images.new_tensor(LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
    return weight * images + strength * layer


def _covering(picture: Tensor, height: int, width: int) -> Tensor:
    """The picture, enlarged if needed to cover height x width."""
    factor = max(height / picture.shape[1], width / picture.shape[2])
    if factor <= 1:
        return picture
    size = [math.ceil(side * factor) for side in picture.shape[1:]]
    return F.interpolate(picture[None], size=size, mode="bilinear", align_corners=False)[0]


@functools.cache
def made_pictures() -> tuple[Tensor, ...]:
    """Five pictures [3, 448, 448] in [0, 1]: crystals with streaks in different directions, on clouds."""
    return tuple(_crystals(number, *colours) for number, colours in enumerate(_COLOURS))


def _crystals(number: int, mean: tuple[int, ...], deviation: tuple[int, ...]) -> Tensor:
    random = KeyedRandom(0, "frost picture", torch.tensor([number]))
    centres = random.uniform(CRYSTALS, 2)[0] * SIDE  # [CRYSTALS, 2]
    axis = torch.arange(SIDE, dtype=torch.float32)
    distances = torch.cdist(torch.cartesian_prod(axis, axis), centres)  # [SIDE², CRYSTALS]
    nearest = distances.topk(2, largest=False)
    seam = torch.exp(-(nearest.values[:, 1] - nearest.values[:, 0]) / 4).view(SIDE, SIDE)  # bright where crystals meet
    directions = 6
    grain = random.normal(directions, 1, SIDE, SIDE)[0]
    streaks = motion_filter(grain, 8, 6, torch.arange(directions) * (180.0 / directions))[:, 0]  # [directions, S, S]
    direction = (nearest.indices[:, 0] % directions).view(SIDE, SIDE)
    streak = streaks.gather(0, direction[None])[0]
    clouds = plasma(512, 1.7, random)[0, :SIDE, :SIDE]
    relief = sum((layer - layer.mean()) / layer.std() for layer in (streak, seam, clouds))
    assert isinstance(relief, Tensor)
    relief = relief / relief.std()
    colours = torch.tensor(mean)[:, None, None] + torch.tensor(deviation)[:, None, None] * relief
    return colours.div(255).clamp(0, 1)


def read_pictures(folder: str | os.PathLike[str]) -> tuple[Tensor, ...]:
    """The pictures [3, H, W] in a folder, in the order of their names.

    Raises:
        ValueError: no such folder, no picture in it, or one that cannot be read.
    """
    from fastnull.data.image_files import IMAGE_SUFFIXES, is_hidden, read_image

    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"frost: there is no folder {root}")
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(p.name))
    if not files:
        raise ValueError(f"frost: {root} holds no picture ({', '.join(IMAGE_SUFFIXES)})")
    pixels = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
              for image in map(read_image, files))  # fmt: skip
    return tuple(picture.permute(2, 0, 1).float() / 255 for picture in pixels)
