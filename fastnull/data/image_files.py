"""Image files: folders of a folder a class, pictures of any depth as 8-bit ones, and files that cannot be read."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastnull.data.classes import match_classes, model_names, printable

IMAGE_SUFFIXES = (
    ".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2",
)  # fmt: skip
_OF_SYSTEMS = ("__MACOSX", "@eaDir")  # what zip files from a Mac, and a NAS's previews, put beside the images
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

Sample = tuple[Any, Any]


class ImageFolder(Dataset[Sample]):
    """Images sorted into a folder a class: root/class/.../image.png.

    Classes are numbered in natural order (2 before 10), as the numbered folders of ImageNetV2 need it. Links are
    followed. Names that start with a dot are neither classes nor images.

    Args:
        root: the folder.
        classes: whose classes the labels are: the names in their order, such as the training folder's or a model's, or
            how many there are (see `match_classes`); None takes the folders' own.

    Attributes:
        classes: names of the classes in the order of the labels.
        files: path and label of each image.

    Raises:
        ValueError: no such folder, no classes, a class without an image, a folder that cannot be read or a link to
            nothing among the classes, or a class that `classes` does not have. A file that cannot be read as an image
            is named when it is asked for.
    """

    def __init__(self, root: str | os.PathLike[str], classes: Sequence[str] | int | None = None) -> None:
        folders = class_folders(root)
        names = [folder.name for folder in folders]
        self.classes = model_names(classes, names, name=f"data: {printable(root)}")
        labels = match_classes(self.classes, names, name=f"data: {printable(root)}")
        self.files: list[tuple[Path, int]] = []
        for folder, label in zip(folders, labels, strict=True):
            files = image_paths(folder)
            if not files:
                raise ValueError(f"data: {printable(folder)} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            self.files += [(path, label) for path in files]

    @property
    def targets(self) -> list[int]:
        """The labels alone."""
        return [label for _, label in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.files[index]
        return read_image(path), label


def class_folders(root: str | os.PathLike[str]) -> list[Path]:
    """The folders of the classes in `root`, in natural order.

    Raises:
        ValueError: no such folder, one that cannot be read, or without a folder in it, or with a link to nothing.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: there is no folder {printable(root)}")
    try:
        entries = [path for path in root.iterdir() if not is_hidden(path.name)]
    except OSError as error:
        raise ValueError(f"data: cannot read the folder {printable(root)}: {error.strerror}") from error
    lost = [path for path in entries if path.is_symlink() and not path.exists()]
    if lost:
        raise ValueError(f"data: {printable(lost[0])} is a link to nothing; without it the classes would be others")
    folders = sorted((path for path in entries if path.is_dir()), key=lambda path: _natural(path.name))
    if not folders:
        raise ValueError(f"data: {printable(root)} must hold one folder of images a class; it holds no folder")
    return folders


def image_paths(folder: Path) -> list[Path]:
    """The image files in a folder and below, in natural order; linked folders are followed, each once.

    Raises:
        ValueError: a folder that cannot be read.
    """
    found = (
        Path(place, name)
        for place, names in _walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    )
    return sorted(found, key=lambda path: _natural(str(path)))


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below with the names of its files."""

    def fail(error: OSError) -> None:
        raise ValueError(f"data: cannot read the folder {printable(error.filename)}: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        identity = os.stat(place)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()  # a link back to where we were
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield place, [name for name in files if not is_hidden(name)]


def is_hidden(name: str) -> bool:
    """Whether a name among classes and images is of the system or an editor, and neither."""
    return name.startswith(".") or name in _OF_SYSTEMS


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names it."""

    def __init__(self, message: str) -> None:
        # a DataLoader makes the error of its worker anew, with the worker's whole traceback for a message
        super().__init__(message.rpartition("BadImageError: ")[2].rstrip("\n"))


def read_image(path: str | os.PathLike[str]) -> Any:
    """An image file as a PIL image in RGB, 8 bits a colour; of several pictures in a file the first.

    Values of more than 8 bits are scaled, floats are taken as 0 to 1. What is transparent keeps its colour, and the
    orientation in EXIF data is left alone, both as torchvision and timm do it.

    Raises:
        BadImageError: no regular file, no image, a broken one, or one whose values have no known range.
    """
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")  # to open a pipe would wait for its other end
        with Image.open(path) as image:
            return eight_bits(image, "RGB")
    except Exception as error:  # what decoders raise on damaged files is of every kind
        if isinstance(error, OSError) and error.errno in _SCARCE:
            raise
        reason = printable(str(error) or type(error).__name__).replace(str(path), os.path.basename(path))
        raise BadImageError(f"data: cannot read the image file {printable(path)}: {reason}") from error


def eight_bits(image: Any, mode: str) -> Any:
    """A PIL image of any mode as "RGB" or "L"; more than 8 bits are scaled, where `convert` would clip them.

    Raises:
        ValueError: integers without a known largest value (32 bits, or signed), floats outside 0 to 1.
    """
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    return image.convert(mode)  # of the same mode a copy, which outlives the file


def _scaled(image: Any) -> Any:
    """A grey image of more than 8 bits → one of 8."""
    import numpy
    from PIL import Image

    values = numpy.asarray(image).astype(numpy.float64)  # [H, W]
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if image.mode == "F":
        white = 1.0
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
            low, high = values.min(), values.max()
            raise ValueError(f"floating-point pixels must lie in 0 to 1; they go from {low:.4g} to {high:.4g}")
    else:
        bits = tags.get(258, (16,))[0]  # BitsPerSample
        white = 2.0**bits - 1
        if bits > 16 or tags.get(339, (1,))[0] != 1 or not (values.min() >= 0 and values.max() <= white):
            raise ValueError("integer pixels must be unsigned, of 16 bits or fewer: of others the white is not known")
    values /= white
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        values = 1 - values
    return Image.fromarray((255 * values).round().astype(numpy.uint8))


def image_mode(channels: int) -> str:
    """PIL's mode of images for a model. Raises ValueError where image files have no such number of channels."""
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"the model takes images of {channels} channels; image files give 1 (grey) or 3 (RGB)")
    return modes[channels]


BAD = -1
"""The label of an image that could not be read."""


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Test images: files through a transform, as pixels in [0, 1].

    Args:
        files: what to read.
        transform: PIL image → bytes [C, H, W] or pixels.
        channels: images are turned into grey (1) or RGB (3) ones.
        skip_bad: a file that cannot be read is a grey image with the label BAD, and no error.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(
        self, files: ImageFolder, transform: Callable[[Any], Tensor], channels: int, skip_bad: bool = False
    ) -> None:
        self.files, self.transform, self.skip_bad = files, transform, skip_bad
        self.mode = image_mode(channels)

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

    @property
    def targets(self) -> list[int]:
        """The labels of all files, whether they can be read or not."""
        return self.files.targets

    def name(self, index: int) -> str:
        """The file of an image, CLASS/FILE."""
        path = self.files.files[index][0]
        return printable(f"{path.parent.name}/{path.name}")


def to_pixels(images: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Bytes → pixels in [0, 1]; floating images pass through. Moved before converted: a byte is a quarter to carry."""
    if device is not None:
        images = images.to(device, non_blocking=True)
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _natural(name: str) -> tuple[list[Any], str]:
    """A key by which 2 comes before 10; the name itself tells 01 from 1."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name
