"""The published test sets as folders on disk: ImageNet val, A, R, C, V2, Sketch, Stylized and DAmageNet.

Each is in ROOT/NAME (which may be a link), with one folder of images per class, named by its WordNet id (n01440764,
...). The folders of imagenet-v2 are named by class number, and those of imagenet-c are in
ROOT/imagenet-c/CORRUPTION/SEVERITY/, as published. If the model names its classes (see fastnull.data.classes), by
WordNet ids or by ImageNet's names, labels follow these names. A model without names must have ImageNet's 1000 classes
in the order of their ids.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnull.checks import check_choice
from fastnull.compat import import_timm
from fastnull.data.classes import classes_of, match_classes, wordnet_ids
from fastnull.data.image_files import ImageFiles, ImageFolder, is_hidden
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
    """

    classes: int = 1000
    numbered: bool = False
    as_is: bool = False


FOLDER_SUITES = {
    "imagenet-val": Layout(),
    "damagenet": Layout(),
    "imagenet-a": Layout(classes=200),
    "imagenet-c": Layout(as_is=True),
    "imagenet-v2": Layout(numbered=True),
    "imagenet-r": Layout(classes=200),
    "imagenet-sketch": Layout(),
    "imagenet-stylized": Layout(),
}
"""Name of the suite and its folder → its layout."""


@dataclass
class FolderSet:
    """An opened test set.

    Attributes:
        images: yields (image [C, H, W] in [0, 1], class of the model); the class of a skipped file is BAD.
        mask: [K] bool, the classes that the model may predict; None: all.
        transform: description of the image transform.
    """

    images: ImageFiles
    mask: Tensor | None
    transform: str


def open_suite(name: str, root: str | os.PathLike[str], model: nn.Module, *, skip_bad: bool = False) -> FolderSet:
    """Open ROOT/NAME, or for imagenet-c a part of it such as "imagenet-c/fog/3", with the model's transforms.

    Args:
        name: of FOLDER_SUITES.
        root: the folder above the test sets.
        model: determines image size, crop, interpolation and labels.
        skip_bad: give unreadable files the label BAD; False: raise an error.

    Raises:
        ValueError: a folder is missing, or its classes are not those of the test set or not known to the model.
    """
    layout = FOLDER_SUITES[name.partition("/")[0]]
    folder, _, known = check_layout(name, root)
    places, count = suite_classes(name, root, model)
    view = View.of(model)
    files = ImageFolder(folder, known)
    files.files = [(path, places[known[label]]) for path, label in files.files]
    # images that were cropped before they were corrupted are not cropped again
    transform = (replace(view, crop=1.0) if layout.as_is else view).evaluation()
    mask = None
    if layout.classes < 1000:
        mask = torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.tensor(sorted(places.values())), True)
    how = "unchanged, resized only if the model has another size" if layout.as_is else (
        f"resized (crop {view.crop:g}, {view.interpolation}), cropped to {view.size[0]}x{view.size[1]}"
    )  # fmt: skip
    return FolderSet(ImageFiles(files, transform, view.channels, skip_bad), mask, how)


def check_layout(name: str, root: str | os.PathLike[str]) -> tuple[Path, set[str], list[str]]:
    """The folder of a test set (or of a part of imagenet-c), its class folders, and the names of all classes.

    Raises:
        ValueError: as `open_suite`. Images are not checked.
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
    """The model's class for each class folder of a test set, and how many classes it has.

    Raises:
        ValueError: the model has no class names and not 1000 classes, or names that are not ImageNet's. The message
            shows both lists.
    """
    kind = name.partition("/")[0]
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
    """The WordNet id of a class given by id or by name; the name itself if ImageNet does not have it.

    Two classes are called crane; the class at the same index is preferred.
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
    """The parts of a suite: one per corruption and severity for imagenet-c; other suites have one."""
    if name != "imagenet-c":
        return [name]
    return [f"imagenet-c/{corruption}/{severity}" for corruption in ALEXNET_ERRORS for severity in severities]


def _layout_of(kind: str) -> str:
    layout = FOLDER_SUITES[kind]
    above = "CORRUPTION/SEVERITY/" if kind == "imagenet-c" else ""
    naming = "class numbers 0 to 999" if layout.numbered else "WordNet ids such as n01440764"
    return f"it must be ROOT/{kind}/{above}CLASS/ with {layout.classes} class folders, named by {naming}"
