"""The published test sets on disk: ImageNet val, A, R, C, V2, Sketch, Stylized, DAmageNet and CIFAR-10-C.

Each is in ROOT/NAME (which may be a link), with one folder of images per class, named by its WordNet id (n01440764,
...). The folders of imagenet-v2 are named by class number, and those of imagenet-c are in
ROOT/imagenet-c/CORRUPTION/SEVERITY/, as published. If the model has class names (see fastnull.data.classes), which are
WordNet ids or ImageNet's names, classes are matched by name. A model without names must have ImageNet's 1000 classes in
the order of their ids.

cifar10-c has the published files ROOT/cifar10-c/CORRUPTION.npy and labels.npy: [50000, 32, 32, 3] bytes, a fifth for
each severity.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnull.checks import check_choice
from fastnull.compat import import_timm
from fastnull.data.classes import classes_of, match_classes, wordnet_ids
from fastnull.data.image_files import ImageFiles, ImageFolder, Sample, is_hidden, to_pixels
from fastnull.data.sources import Samples
from fastnull.data.view import View
from fastnull.robustness.corruptions import SEVERITIES
from fastnull.robustness.metrics import ALEXNET_ERRORS


@dataclass(frozen=True)
class Layout:
    """How a test set is stored.

    Attributes:
        classes: number of class folders; if fewer than 1000, the model's other classes are masked out.
        numbered: folders are named by class numbers, not by WordNet ids.
        as_is: images are neither resized nor cropped if they have the model's size.
        arrays: all images of a corruption are in one .npy file.
    """

    classes: int = 1000
    numbered: bool = False
    as_is: bool = False
    arrays: bool = False


FOLDER_SUITES = {
    "imagenet-val": Layout(),
    "damagenet": Layout(),
    "imagenet-a": Layout(classes=200),
    "imagenet-c": Layout(as_is=True),
    "imagenet-v2": Layout(numbered=True),
    "imagenet-r": Layout(classes=200),
    "imagenet-sketch": Layout(),
    "imagenet-stylized": Layout(),
    "cifar10-c": Layout(classes=10, arrays=True),
}
"""Name of the suite, which is also its folder name → layout."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_CORRUPTIONS = (
    "shot_noise", "motion_blur", "snow", "pixelate", "gaussian_noise", "defocus_blur", "brightness", "fog", "zoom_blur",
    "frost", "glass_blur", "impulse_noise", "contrast", "jpeg_compression", "elastic_transform",
)  # fmt: skip
"""Corruptions of CIFAR-10-C in RobustBench's order."""


@dataclass
class FolderSet:
    """An opened test set.

    Attributes:
        images: yields (image [C, H, W] in [0, 1], class index of the model); the class of a skipped file is BAD.
        mask: [K] bool, the classes that the model may predict; None: all.
        transform: description of the image transform.
    """

    images: Dataset[tuple[Tensor, Any]]
    mask: Tensor | None
    transform: str


def open_suite(name: str, root: str | os.PathLike[str], model: nn.Module, *, skip_bad: bool = False) -> FolderSet:
    """Open ROOT/NAME, or a part of it such as "imagenet-c/fog/3" or "cifar10-c/fog/3", with the model's transforms.

    Args:
        name: a key of FOLDER_SUITES, or a part of it.
        root: the folder above the test sets.
        model: determines image size, crop, interpolation and labels.
        skip_bad: give unreadable files the label BAD; False: raise an error.

    Raises:
        ValueError: a folder is missing, or its classes are not those of the test set or of the model.
    """
    layout = FOLDER_SUITES[name.partition("/")[0]]
    places, count = suite_classes(name, root, model)
    view = View.of(model)
    if layout.arrays:
        show = view.evaluation()
        order = [places[known] for known in CIFAR10]
        images = Samples(ArrayPart(name, root), lambda image: to_pixels(show(image)), view.channels, classes=order)
        return FolderSet(images, None, str(view))
    folder, _, known = check_layout(name, root)
    files = ImageFolder(folder, known)
    files.files = [(path, places[known[label]]) for path, label in files.files]
    # these images were already cropped before the corruption
    transform = (replace(view, crop=1.0) if layout.as_is else view).evaluation()
    mask = None
    if layout.classes < 1000:
        mask = torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.tensor(sorted(places.values())), True)
    how = "unchanged, resized only if the model has another size" if layout.as_is else str(view)
    return FolderSet(ImageFiles(files, transform, view.channels, skip_bad), mask, how)


class ArrayPart(Dataset[Sample]):
    """One corruption and severity of cifar10-c as PIL images and labels. The images stay on disk (memory-mapped).

    Raises:
        ValueError: a file is missing or cannot be read, or its contents are not as published.
    """

    def __init__(self, name: str, root: str | os.PathLike[str]) -> None:
        kind, corruption, severity = name.split("/")
        pixels, labels = (_array(Path(root, kind, f"{file}.npy")) for file in (corruption, "labels"))
        count = len(pixels) // len(SEVERITIES) if pixels.ndim else 0
        right = pixels.shape == (len(SEVERITIES) * count, 32, 32, 3) and pixels.dtype.name == "uint8" and count
        right = right and labels.shape == pixels.shape[:1] and labels.dtype.kind in "iu"
        if not right or not set(labels.tolist()) <= set(range(len(CIFAR10))):
            raise ValueError(
                f"{name}: {corruption}.npy must be bytes [5 n, 32, 32, 3] and labels.npy their classes 0 to 9; got "
                f"{pixels.dtype} {list(pixels.shape)} and {labels.dtype} {list(labels.shape)}"
            )
        part = slice((int(severity) - 1) * count, int(severity) * count)
        self.pixels, self.targets = pixels[part], labels[part].astype(int).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        return Image.fromarray(self.pixels[index]), self.targets[index]


def _array(path: Path) -> Any:
    import numpy

    if not path.is_file():
        raise ValueError(f"cifar10-c: there is no file {path}; {_layout_of('cifar10-c')}")
    try:
        found = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cifar10-c: cannot read {path}: {error}") from error
    if not isinstance(found, numpy.ndarray):
        raise ValueError(f"cifar10-c: {path} must hold one array (.npy)")
    return found


def check_layout(name: str, root: str | os.PathLike[str]) -> tuple[Path, set[str], list[str]]:
    """The folder of a test set (or of a part of imagenet-c), its class folders, and the names of all classes.

    Raises:
        ValueError: the same errors as in `open_suite`. Images are not checked.
    """
    kind, *inner = name.split("/")
    layout = FOLDER_SUITES[check_choice("suite", kind, FOLDER_SUITES)]
    folder = Path(root, kind, *inner)
    if not folder.is_dir():
        raise ValueError(f"{kind}: there is no folder {folder}; {_layout_of(kind)}")
    names = {path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)}
    known = [str(number) for number in range(1000)] if layout.numbered else list(wordnet_ids())
    foreign = sorted(names - set(known))
    if foreign or len(names) != layout.classes:
        what = f"among them {', '.join(foreign[:3])}" if foreign else f"not the {layout.classes} of {kind}"
        raise ValueError(f"{kind}: {folder} holds {len(names)} class folders, {what}; {_layout_of(kind)}")
    return folder, names, known


def suite_classes(name: str, root: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, int], int]:
    """Class folder of a test set → class index of the model; and the model's number of classes.

    Raises:
        ValueError: the model has no class names and not 1000 classes, or names that are not ImageNet's. The message
            shows both lists.
    """
    kind = name.partition("/")[0]
    if FOLDER_SUITES[check_choice("suite", kind, FOLDER_SUITES)].arrays:
        ArrayPart(name, root)
        found = match_classes(classes_of(model), CIFAR10, name=kind)
        return dict(zip(CIFAR10, found, strict=True)), len(CIFAR10)
    _, folders, known = check_layout(name, root)
    ids = [known.index(folder) for folder in sorted(folders, key=known.index)]
    classes = classes_of(model)
    if classes is None or isinstance(classes, int):
        if classes not in (None, len(known)):
            raise ValueError(f"{kind}: the model must have ImageNet's {len(known)} classes; it has {classes}")
        return {known[index]: index for index in ids}, len(known)
    own = [_wordnet_id(name, index) for index, name in enumerate(classes)]
    found = match_classes(own, [wordnet_ids()[index] for index in ids], name=kind)
    return {known[index]: place for index, place in zip(ids, found, strict=True)}, len(classes)


def _wordnet_id(name: str, place: int) -> str:
    """The WordNet id of a class given by id or by name; the name itself if it is not in ImageNet.

    If several classes have the same name (crane, for example), the class at the same index is preferred.
    """
    meant = _wordnet_names().get(_plain(name), [])
    if name in wordnet_ids() or (place not in meant and len(meant) != 1):
        return name
    return wordnet_ids()[place if place in meant else meant[0]]


@functools.cache
def _wordnet_names() -> dict[str, list[int]]:
    """ImageNet's class names ("tench, Tinca tinca", and each name in it) → class numbers."""
    info = import_timm().data.ImageNetInfo("imagenet-1k")
    places: dict[str, list[int]] = {}
    for index in range(len(wordnet_ids())):
        whole = info.index_to_description(index)
        for name in dict.fromkeys(map(_plain, (whole, *whole.split(",")))):
            places.setdefault(name, []).append(index)
    return places


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def suite_parts(name: str, severities: Sequence[int] = SEVERITIES) -> list[str]:
    """The parts of a suite: one per corruption and severity for imagenet-c and cifar10-c; other suites have one."""
    corruptions = {"imagenet-c": tuple(ALEXNET_ERRORS), "cifar10-c": CIFAR10_CORRUPTIONS}.get(name)
    if corruptions is None:
        return [name]
    return [f"{name}/{corruption}/{severity}" for corruption in corruptions for severity in severities]


def _layout_of(kind: str) -> str:
    layout = FOLDER_SUITES[kind]
    if layout.arrays:
        return f"ROOT/{kind} must hold CORRUPTION.npy for each corruption, and labels.npy"
    above = "CORRUPTION/SEVERITY/" if kind == "imagenet-c" else ""
    naming = "class numbers 0 to 999" if layout.numbered else "WordNet ids such as n01440764"
    return f"it must be ROOT/{kind}/{above}CLASS/ with {layout.classes} class folders, named by {naming}"
