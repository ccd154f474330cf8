"""Image files: folders of a folder a class, and files that cannot be read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

Sample = tuple[Any, Any]


class ImageFolder(Dataset[Sample]):
    """Images sorted into a folder a class: root/class/.../image.png.

    Classes are numbered in natural order (2 before 10), as the numbered folders of ImageNetV2 need it.

    Args:
        root: the folder.
        classes: names that fix the numbering, such as those of the training folder; None takes the folders' own.

    Raises:
        ValueError: no such folder, no classes, a class without an image, or one that `classes` does not name. A file
            that cannot be read as an image is named when it is asked for.
    """

    def __init__(self, root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> None:
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"data: there is no folder {root}")
        folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: _natural(path.name))
        names = [path.name for path in folders]
        if not names:
            raise ValueError(f"data: {root} must hold one folder of images a class; it holds no folder")
        self.classes = list(classes) if classes is not None else names
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise ValueError(f"data: {root} has classes that the training data lacks: {', '.join(unknown[:5])}")
        self.files: list[tuple[Path, int]] = []
        for folder in folders:
            files = sorted(
                (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES),
                key=lambda path: _natural(str(path)),
            )
            if not files:
                raise ValueError(f"data: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            self.files += [(path, self.classes.index(folder.name)) for path in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.files[index]
        return read_image(path), label


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names it."""


def read_image(path: Path) -> Any:
    """An image file as a PIL image in RGB. Raises BadImageError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImageError(f"data: cannot read the image file {path}: {error}") from error


BAD = -1
"""The label of an image that could not be read."""


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Test images: files through a transform, as pixels in [0, 1].

    Args:
        files: what to read.
        transform: PIL image → bytes [C, H, W] or pixels.
        channels: images are turned into grey (1) or RGB ones.
        skip_bad: a file that cannot be read is a grey image with the label BAD, and no error.
    """

    def __init__(
        self, files: ImageFolder, transform: Callable[[Any], Tensor], channels: int, skip_bad: bool = False
    ) -> None:
        self.files, self.transform, self.skip_bad = files, transform, skip_bad
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        try:
            image, label = self.files[index]
        except BadImageError as error:
            if not self.skip_bad:
                raise BadImageError(f"{error} (--skip-bad leaves such files out, and counts them)") from error
            image, label = Image.new("RGB", (64, 64), (128, 128, 128)), BAD
        return to_pixels(self.transform(image.convert(self.mode))), label

    def name(self, index: int) -> str:
        """The file of an image, CLASS/FILE."""
        path = self.files.files[index][0]
        return f"{path.parent.name}/{path.name}"


def to_pixels(images: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Bytes → pixels in [0, 1]; floating images pass through. Moved before converted: a byte is a quarter to carry."""
    if device is not None:
        images = images.to(device, non_blocking=True)
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
