"""Small real photographs that need no download: crops of the pictures in the scikit-image package.

Each picture is a class. It is divided into tiles; every third tile (along diagonals) is for testing, the others are for
training. A crop is within one tile, so training and test images have no pixel in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastnull.checks import check_number
from fastnull.rng import generator

PHOTOS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble", "immunohistochemistry",
    "motorcycle", "retina", "rocket",
)  # fmt: skip
"""The classes, named as the pictures in scikit-image; camera, brick, coins, grass and gravel are grey."""


class Crops(TensorDataset):
    """Images and labels.

    Attributes:
        groups: number of the tile of each image [n], over all pictures. Crops of one tile may overlap, so a split must
            keep them together, as fastnull.data.hold_out does.
    """

    def __init__(self, images: Tensor, labels: Tensor, groups: Tensor) -> None:
        super().__init__(images, labels)
        self.groups = groups


PHOTOS_TRAIN, PHOTOS_TEST = 120, 40
"""Images of each class."""

TILE, CROP = 64, 48
"""Sides in pixels of the original pictures; crops are then resized."""


def photos(size: int | tuple[int, int] = 32, channels: int = 3) -> tuple[Crops, Crops]:
    """Crops of 13 photographs as (train, test) with 1560 and 520 images, the same number of each class.

    Args:
        size: height and width in pixels (one number or both), 16 to 64; the 48x48 crops are resized bilinearly, with
            antialiasing.
        channels: 3, or 1 for the mean of the colours.

    Returns:
        Two datasets of image [channels, H, W] (float32 in [0, 1]) and label, with the tile of each image in `groups`;
        always the same.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError: a size or a number of channels out of range.
    """
    height, width = (size, size) if isinstance(size, int) else size
    for side in (height, width):
        check_number("size", side, 16, 64)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3; got {channels!r}")
    sets: dict[bool, tuple[list[Tensor], list[int], list[int]]] = {False: ([], [], []), True: ([], [], [])}
    for label, name in enumerate(PHOTOS):
        picture = load_picture(name)
        for testing, (crops, labels, groups) in sets.items():
            count = PHOTOS_TEST if testing else PHOTOS_TRAIN
            cut, tiles = _crops(picture, testing, count, generator(label, testing))
            crops.append(cut)
            labels += [label] * count
            first = max(groups, default=-1) + 1
            groups += [first + tile for tile in tiles]
    train, test = (_dataset(*sets[testing], (height, width), channels) for testing in (False, True))
    return train, test


def load_picture(name: str) -> Tensor:
    """[3, H, W] bytes."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(f"the photos need scikit-image (pip install scikit-image): {error}") from error
    readers: dict[str, Callable[[], Any]] = {
        "hubble": data.hubble_deep_field,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
    }
    pixels = torch.from_numpy(readers.get(name, getattr(data, name, None))().copy())  # type: ignore[misc]
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)


def _crops(picture: Tensor, testing: bool, count: int, source: torch.Generator) -> tuple[Tensor, list[int]]:
    """Random crops [count, 3, CROP, CROP] within the tiles of one set, spread evenly over them, and their tiles."""
    rows, columns = (side // TILE for side in picture.shape[1:])
    tiles = [(row, column) for row in range(rows) for column in range(columns) if ((row + column) % 3 == 0) == testing]
    places = torch.randint(TILE - CROP + 1, (count, 2), generator=source).tolist()
    # spread over the picture if there are more tiles than crops
    chosen = [k * len(tiles) // count if len(tiles) > count else k % len(tiles) for k in range(count)]
    crops = []
    for tile, (down, right) in zip(chosen, places, strict=True):
        row, column = tiles[tile]
        top, left = row * TILE + down, column * TILE + right
        crops.append(picture[:, top : top + CROP, left : left + CROP])
    return torch.stack(crops), chosen


def _dataset(crops: list[Tensor], labels: list[int], groups: list[int], size: tuple[int, int], channels: int) -> Crops:
    images = torch.cat(crops).float() / 255  # [n, 3, CROP, CROP]
    if size != (CROP, CROP):
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    if channels == 1:
        images = images.mean(1, keepdim=True)
    return Crops(images.clamp(0, 1), torch.tensor(labels), torch.tensor(groups))
