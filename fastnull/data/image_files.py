"""Image files: folders with one folder per class, conversion to 8 bits, and unreadable files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastnull.data.classes import class_order, match_classes, model_names, natural_parts, printable

IMAGE_SUFFIXES = (
    ".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2",
)  # fmt: skip
_OF_SYSTEMS = ("__MACOSX", "@eaDir")  # created by zip files from a Mac and by the previews of a NAS
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

Sample = tuple[Any, Any]


class ImageFolder(Dataset[Sample]):
    """Images in one folder per class: root/class/.../image.png.

    Classes are numbered in timm's order (2 before 10, upper and lower case alike), which ImageNetV2 needs. Links are
    followed. Names that start with a dot are ignored.

    Args:
        root: the folder.
        classes: the classes that define the labels: names in order, such as those of the training folder or of a
            model, or their number (see `match_classes`); None: the folders themselves.

    Attributes:
        root: the folder.
        classes: names of the classes in the order of the labels.
        files: path and label of each image.

    Raises:
        ValueError: no such folder, no classes, a class without an image, a folder that cannot be read, a broken link
            among the classes, or a class that `classes` does not have. Image files are checked only when they are read.
    """

    def __init__(self, root: str | os.PathLike[str], classes: Sequence[str] | int | None = None) -> None:
        self.root = Path(root)
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
        """The labels."""
        return [label for _, label in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.files[index]
        return read_image(path), label


def class_folders(root: str | os.PathLike[str]) -> list[Path]:
    """The folders of the classes in `root`, in the order of `class_order`.

    Raises:
        ValueError: no such folder, or it cannot be read, contains no folder, or contains a broken link.
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
        raise ValueError(f"data: {printable(lost[0])} is a broken link; without it the class numbers would change")
    folders = sorted((path for path in entries if path.is_dir()), key=lambda path: class_order(path.name))
    if not folders:
        raise ValueError(f"data: {printable(root)} must hold one folder of images per class; it holds no folder")
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
            folders.clear()  # a link to a folder above
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield place, [name for name in files if not is_hidden(name)]


def is_hidden(name: str) -> bool:
    """Whether a name belongs to the system or an editor, not to a class or an image."""
    return name.startswith(".") or name in _OF_SYSTEMS


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names it."""

    def __init__(self, message: str) -> None:
        # a DataLoader raises a worker's error again with the whole traceback as the message
        super().__init__(message.rpartition("BadImageError: ")[2].rstrip("\n"))


def read_image(path: str | os.PathLike[str]) -> Any:
    """Read an image file as a PIL image in RGB, 8 bits per channel; only the first picture of a file is read.

    Values of more than 8 bits are scaled; floats must be in 0 to 1. Transparency and the orientation in EXIF data are
    ignored, as in torchvision and timm.

    Raises:
        BadImageError: not a regular file, not an image, damaged, or with values of unknown range.
    """
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")  # opening a pipe would block
        with Image.open(path) as image:
            return eight_bits(image, "RGB")
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        if isinstance(error, OSError) and error.errno in _SCARCE:
            raise
        reason = printable(str(error) or type(error).__name__).replace(str(path), os.path.basename(path))
        raise BadImageError(f"data: cannot read the image file {printable(path)}: {reason}") from error


def eight_bits(image: Any, mode: str) -> Any:
    """Convert a PIL image of any mode to "RGB" or "L"; more than 8 bits are scaled, where `convert` would clip.

    Raises:
        ValueError: integers without a known largest value (32 bits, or signed), floats outside 0 to 1.
    """
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    return image.convert(mode)  # a copy even in the same mode, so the file can be closed


def _scaled(image: Any) -> Any:
    """Scale a grey image of more than 8 bits to 8 bits."""
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
            raise ValueError("integer pixels must be unsigned, of 16 bits or fewer; the range of others is unknown")
    values /= white
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        values = 1 - values
    return Image.fromarray((255 * values).round().astype(numpy.uint8))


def image_mode(channels: int) -> str:
    """PIL's mode for a number of channels. Raises ValueError unless that is 1 or 3."""
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"the model takes images of {channels} channels; image files give 1 (grey) or 3 (RGB)")
    return modes[channels]


BAD = -1
"""The label of an image that could not be read."""


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Test images: files with a transform, as pixels in [0, 1].

    Args:
        files: what to read.
        transform: PIL image → bytes [C, H, W] or pixels.
        channels: convert images to grey (1) or RGB (3).
        skip_bad: an unreadable file gives a grey image with the label BAD; False: an error.

    Attributes:
        shown: what the transform does, for records; None if unknown.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(
        self, files: ImageFolder, transform: Callable[[Any], Tensor], channels: int, skip_bad: bool = False
    ) -> None:
        self.files, self.transform, self.skip_bad = files, transform, skip_bad
        self.shown: str | None = None
        self.mode = image_mode(channels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        try:
            image, label = self.files[index]
        except BadImageError as error:
            if not self.skip_bad:
                raise BadImageError(f"{error} (--skip-bad skips and counts such files)") from error
            image, label = Image.new("RGB", (64, 64), (128, 128, 128)), BAD
        return to_pixels(self.transform(image.convert(self.mode))), label

    @property
    def targets(self) -> list[int]:
        """The labels of all files, readable or not."""
        return self.files.targets

    def name(self, index: int) -> str:
        """The file of an image, CLASS/FILE."""
        path = self.files.files[index][0]
        return printable(f"{path.parent.name}/{path.name}")


def to_pixels(images: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Bytes → pixels in [0, 1]; float images are unchanged. Bytes are moved to the device before the conversion."""
    if device is not None:
        images = images.to(device, non_blocking=True)
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _natural(name: str) -> tuple[list[Any], str]:
    """Sort key of files with 2 before 10; the name itself orders 01 and 1."""
    return natural_parts(name), name
