"""The data sets: embedded, folders of images, timm's; their samples and the order of an epoch."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from fastnull.checks import check_number
from fastnull.data.classes import classes_of, match_classes, model_names, names_of
from fastnull.data.image_files import (
    BadImageError,
    ImageFiles,
    ImageFolder,
    Sample,
    class_folders,
    eight_bits,
    image_mode,
    read_image,
    to_pixels,
)
from fastnull.data.photos import PHOTOS, photos
from fastnull.data.subset import labels_of
from fastnull.data.view import View
from fastnull.rng import generator, preserved

DIGITS_TEST = 500
"""Test images of the embedded digits; the other 1297 are for training."""
TIMM_PREFIXES = ("torch", "hfds")
_STREAMS = ("hfids", "wds", "tfds")
_TEST_FOLDERS = ("val", "validation", "test")


def digits(size: int | tuple[int, int] = 16, channels: int = 3) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1797 handwritten digits, which need no download, as (train, test) with 1297 and 500 images.

    Args:
        size: height and width in pixels (one number or both); the 8x8 originals are resized bilinearly.
        channels: the grey value is repeated so often.

    Returns:
        Two datasets of image [channels, H, W] (float32 in [0, 1]) and label; always the same split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    height, width = (size, size) if isinstance(size, int) else size
    check_number("size", min(height, width), 1)
    check_number("channels", channels, 1)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits need scikit-learn (pip install scikit-learn): {error}") from error
    found = load_digits()
    grey = torch.from_numpy(found.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    images = F.interpolate(grey, size=(height, width), mode="bilinear", align_corners=False)
    images = images.clamp(0, 1).expand(-1, channels, -1, -1).contiguous()  # [1797, channels, H, W]
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=generator(0))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


@dataclass(frozen=True)
class Embedded:
    """A data set that needs no download.

    Attributes:
        load: (size, channels) → (train, test), images in [0, 1] at that size.
        classes: their names.
        model: a small model for it.
    """

    load: Callable[[tuple[int, int], int], tuple[TensorDataset, TensorDataset]]
    classes: list[str]
    model: str


EMBEDDED = {
    "digits": Embedded(digits, [str(digit) for digit in range(10)], "vit_digits"),
    "photos": Embedded(photos, list(PHOTOS), "vit_photos"),
}
"""What `--data` takes besides folders and timm's names."""


def embedded(name: str, model: nn.Module) -> tuple[TensorDataset, TensorDataset]:
    """(train, test) of an embedded data set at the size and with the channels that the model takes."""
    view = View.of(model)
    return EMBEDDED[name].load(view.size, view.channels)


@dataclass(frozen=True)
class Source:
    """Training data before transforms.

    Attributes:
        train: yields (image, label); None for embedded data, which is made at the size that the model takes.
        num_classes: None where the data does not say.
        classes: their names, where they have any.
        transforms: whether the images are of any size and go through the model's transforms.
    """

    train: Dataset[Sample] | None
    num_classes: int | None
    classes: list[str] | None = None
    transforms: bool = False


def open_source(data: str, *, data_dir: str | None = None, download: bool = False) -> Source:
    """Find the training data that `data` names (with data_dir and download).

    Raises:
        ValueError: no such folder or dataset, one that is a stream, or one of a single class.
    """
    if data in EMBEDDED:
        classes = EMBEDDED[data].classes
        return Source(None, len(classes), classes)
    if _timm_name(data):
        found = _timm_dataset(data, data_dir, "train", download)
        names = names_of(found)
        return Source(found, None if names is None else len(names), names, transforms=True)
    folder = ImageFolder(_split_folder(data, ("train",)))
    return Source(folder, len(folder.classes), folder.classes, transforms=True)


def evaluation_data(
    data: str,
    model: nn.Module,
    *,
    data_dir: str | None = None,
    download: bool = False,
    skip_bad: bool = False,
    labelled: bool = True,
) -> Dataset[tuple[Tensor, int]]:
    """The test set that belongs to `FinetuneConfig.data`: finetuning never sees it.

    Labels are those of the model: matched by name where it knows its classes (see fastnull.data.classes). One that does
    not is taken to have those of the training data in their order, and must have as many.

    Args:
        data, data_dir, download: as in FinetuneConfig. A folder needs no train/ where the model has names.
        model: its configuration gives image size, crop and interpolation, and its classes the labels.
        skip_bad: of a folder: see ImageFiles.
        labelled: False is for images alone: labels are the data's own, whatever classes the model has.

    Returns:
        A dataset of (image [C, H, W] in [0, 1], label).

    Raises:
        ValueError: no such data, or classes that are not the model's.
    """
    known = classes_of(model) if labelled else None
    if data in EMBEDDED:
        images, labels = embedded(data, model)[1].tensors
        return TensorDataset(images, torch.tensor(match_classes(known, EMBEDDED[data].classes, name=data))[labels])
    view = View.of(model)
    evaluation = view.evaluation()
    if _timm_name(data):
        base = _timm_dataset(data, data_dir, "validation", download)
        names = names_of(base)
        matched = None if names is None else match_classes(known, names, name=data)
        return Samples(base, lambda image: to_pixels(evaluation(image)), view.channels, classes=matched)
    tested = _split_folder(data, _TEST_FOLDERS)
    if not isinstance(known, list):
        train = [folder.name for folder in class_folders(_split_folder(data, ("train",)))]
        known = model_names(known, train, name=f"{data}/train")
    return ImageFiles(ImageFolder(tested, known), evaluation, view.channels, skip_bad)


class Samples(Dataset[tuple[Tensor, Any]]):
    """A dataset through a transform, with every random draw of a sample keyed by (seed, epoch, index).

    Args:
        base: yields (PIL image or tensor, label).
        transform: applied to the image; None leaves it.
        channels: PIL images are turned into grey (1) or RGB (3) ones; None leaves them.
        seed: of the draws.
        classes: the label that each class number of `base` becomes (see `match_classes`); None leaves labels.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(
        self,
        base: Dataset[Sample],
        transform: Callable[[Any], Tensor] | None = None,
        channels: int | None = None,
        seed: int = 0,
        classes: Sequence[int] | None = None,
    ) -> None:
        self.base, self.transform, self.seed = base, transform, seed
        self.mode = None if channels is None else image_mode(channels)
        in_order = classes is None or list(classes) == list(range(len(classes)))
        self.labels = None if classes is None or in_order else torch.tensor(classes)
        # tensors in memory draw nothing, and keying costs as much as fetching them
        self.draws = not isinstance(base.dataset if isinstance(base, Subset) else base, TensorDataset)

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        if not self.draws:
            image, label = self.base[index]
            return image, self._label(label)
        with keyed(self.seed, epoch, index):
            image, label = self.base[index] if self.mode is None else self._read(index, self.mode)
            image = image if self.transform is None else self.transform(image)
        if not isinstance(image, Tensor):
            raise TypeError(f"data must yield image tensors [C, H, W]; got {type(image).__name__} for image {index}")
        return image, self._label(label)

    def _read(self, index: int, mode: str) -> tuple[Any, Any]:
        """An image file, decoded; whatever fails on the way is that file's fault."""
        if index >= len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            image, label = self.base[index]
            return eight_bits(image, mode) if hasattr(image, "convert") else image, label
        except BadImageError:
            raise
        except Exception as error:
            raise BadImageError(f"data: cannot read image {index}: {str(error) or type(error).__name__}") from error

    @property
    def targets(self) -> Tensor | None:
        """All labels [n], where they can be told without reading images."""
        found = labels_of(self.base)
        return found if found is None or self.labels is None else self.labels[found]

    def _label(self, label: Any) -> Any:
        """A class number of the data → the model's."""
        if self.labels is None:
            return label
        if isinstance(label, Tensor) and label.ndim:
            raise ValueError(f"labels must be class numbers where data and model have names; got {list(label.shape)}")
        return int(self.labels[int(label)])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, epoch) in an order that is a function of (seed, epoch); set `epoch` and `start` before use.

    Args:
        length: of the dataset.
        batch_size: of every batch; a rest that does not fill one is left for another epoch.
        batches: a run through it yields so many.
        seed: of the order.
        rows: of every batch the ones that are yielded, where several processes share it; None is all.
    """

    def __init__(
        self, length: int, batch_size: int, batches: int, seed: int, rows: Sequence[int] | None = None
    ) -> None:
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.rows = range(batch_size) if rows is None else rows
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=generator(self.seed, self.epoch)).tolist()
        for batch in range(self.start, self.batches):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(chosen[row], self.epoch) for row in self.rows]


def loader(
    data: Dataset[Any],
    batches: EpochBatches | int,
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    persistent: bool = False,
) -> DataLoader[Any]:
    """A DataLoader over a sampler of batches, or in order with a batch size; leaves the global generators alone."""
    how: dict[str, Any] = {"batch_sampler": batches} if isinstance(batches, EpochBatches) else {"batch_size": batches}
    return DataLoader(
        data,
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=persistent and workers > 0,
        # Ctrl-C reaches the whole process group: the main process alone decides what it means
        worker_init_fn=_ignore_interrupt,
        # without one of its own, each iteration draws from the global generator and shifts dropout
        generator=torch.Generator().manual_seed(0),
        **how,
    )


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def hold_out(data: Dataset[Any], fraction: float, seed: int) -> tuple[Subset[Any], Subset[Any] | None]:
    """Split off a random share for validation; (train, validation). A share of 0 gives None.

    Images that share pixels stay together: where the data has `groups` [n] (photos.Crops), whole groups are drawn
    until there are enough.
    """
    total = len(data)  # type: ignore[arg-type]
    count = round(fraction * total)
    _, group, sizes = torch.unique(
        getattr(data, "groups", torch.arange(total)), return_inverse=True, return_counts=True
    )
    order = torch.randperm(len(sizes), generator=generator(seed))
    before = sizes[order].cumsum(0) - sizes[order]  # images of the groups in front of each
    held = torch.isin(group, order[before < count])  # [n]
    if fraction and not 0 < held.sum() < total:
        raise ValueError(f"val_fraction {fraction:g} of {total} training images leaves one of both parts empty")
    rest, chosen = ((held == part).nonzero().flatten().tolist() for part in (False, True))
    return Subset(data, rest), Subset(data, chosen) if chosen else None


def seed_everything(*key: int) -> None:
    """Seed torch's, NumPy's and Python's global generators with a number made from integers such as (seed, step)."""
    import numpy

    seed = generator(*key).initial_seed()
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def keyed(*key: int) -> Iterator[None]:
    """The global generators are seeded by the key inside, and as before after."""
    with preserved():
        seed_everything(*key)
        yield


def _timm_name(data: str) -> bool:
    prefix = data.partition("/")[0].lower()
    if prefix in _STREAMS and not os.path.isdir(data):
        raise ValueError(
            f"data {data!r} is a stream, whose order cannot be resumed exactly; use {' or '.join(TIMM_PREFIXES)}, a "
            "folder of images, or pass a dataset as train_data"
        )
    return prefix in TIMM_PREFIXES and "/" in data and not os.path.isdir(data)


def _timm_dataset(name: str, root: str | None, split: str, download: bool) -> Any:
    if root is None and not name.lower().startswith("hfds/"):  # Hugging Face has a cache of its own
        raise ValueError(f"data {name!r} needs data_dir (--data-dir), the folder where timm keeps it")
    try:
        found = _timm_data().create_dataset(name, root=root, split=split, download=download)
    except (AssertionError, RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
        raise ValueError(f"data {name!r} (data_dir {root!r}, download {download}) cannot be opened: {error}") from error
    # timm would go on to the next image in silence where one cannot be read, and clip more than 8 bits to white
    found._max_retries = 1
    found.input_img_mode = None
    if hasattr(found, "loader"):  # torchvision's folders clip too
        found.loader = read_image
    return found


def _split_folder(data: str, names: Sequence[str]) -> Path:
    root = Path(data)
    if not root.is_dir():
        raise ValueError(
            "data must be 'digits', 'photos', a folder with train/ and val/, or a timm dataset such as "
            "'torch/cifar10'; "
            f"there is no folder {data!r}"
        )
    for name in names:
        if (root / name).is_dir():
            return root / name
    inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise ValueError(f"data folder {data} must hold a folder {' or '.join(names)}; it holds {inside}")


def _timm_data() -> Any:
    from fastnull.compat import import_timm

    return import_timm().data
