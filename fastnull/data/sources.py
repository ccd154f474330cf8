"""Data sets: embedded, folders of images, timm's; samples with keyed augmentation, and the order of an epoch."""

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
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate

from fastnull.checks import check_number
from fastnull.compat import import_timm
from fastnull.data.classes import classes_of, match_classes, model_names, names_of, warn_of_assumed_order
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
    """scikit-learn's 1797 handwritten digits, which need no download: (train, test) with 1297 and 500 images.

    Args:
        size: height and width in pixels (one number or both); the 8x8 originals are resized bilinearly.
        channels: number of repetitions of the grey value.

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
"""Data sets that `--data` accepts besides folders and timm's names."""


def embedded(name: str, model: nn.Module) -> tuple[TensorDataset, TensorDataset]:
    """(train, test) of an embedded data set at the model's size and number of channels."""
    view = View.of(model)
    return EMBEDDED[name].load(view.size, view.channels)


@dataclass(frozen=True)
class Source:
    """Training data before transforms.

    Attributes:
        train: yields (image, label); None for embedded data, which depends on the model's size.
        num_classes: None if unknown.
        classes: class names; None if unknown.
        transforms: whether images can have any size and need the model's transforms.
    """

    train: Dataset[Sample] | None
    num_classes: int | None
    classes: list[str] | None = None
    transforms: bool = False


def open_source(data: str, *, data_dir: str | None = None, download: bool = False) -> Source:
    """Open the training data named `data`.

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
    """The test set of `FinetuneConfig.data`, which finetuning does not use.

    Labels are the model's, matched by name if it has class names (see fastnull.data.classes). Otherwise its classes
    must be those of the training data in their order.

    Args:
        data, data_dir, download: as in FinetuneConfig. A folder needs no train/ if the model has class names.
        model: determines image size, crop, interpolation and labels.
        skip_bad: for folders, see ImageFiles.
        labelled: False: keep the data's own labels, whatever classes the model has.

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
        if labelled and names is not None:
            warn_of_assumed_order(known, names)
        matched = None if names is None else match_classes(known, names, name=data)
        samples = Samples(base, lambda image: to_pixels(evaluation(image)), view.channels, classes=matched)
        samples.shown = str(view)
        return samples
    tested = _split_folder(data, _TEST_FOLDERS)
    if not isinstance(known, list):
        train = [folder.name for folder in class_folders(_split_folder(data, ("train",)))]
        if labelled:
            warn_of_assumed_order(known, train)
        known = model_names(known, train, name=f"{data}/train")
    files = ImageFiles(ImageFolder(tested, known), evaluation, view.channels, skip_bad)
    files.shown = str(view)
    return files


def has_test_images(data: str) -> bool:
    """Whether `evaluation_data` finds a test set; only folders can lack one."""
    return not os.path.isdir(data) or any((Path(data) / name).is_dir() for name in _TEST_FOLDERS)


class Samples(Dataset[tuple[Tensor, Any]]):
    """A dataset with a transform; the random numbers of a sample are keyed by (seed, epoch, index).

    Args:
        base: yields (PIL image or tensor, label).
        transform: applied to the image; None: no transform.
        channels: convert PIL images to grey (1) or RGB (3); None: no conversion.
        seed: of the random numbers.
        classes: new label of each class of `base` (see `match_classes`); None: labels are kept.

    Attributes:
        shown: what the transform does, for records; None if unknown.

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
        self.shown: str | None = None
        self.mode = None if channels is None else image_mode(channels)
        in_order = classes is None or list(classes) == list(range(len(classes)))
        self.labels = None if classes is None or in_order else torch.tensor(classes)
        # tensors in memory need no random numbers, and seeding costs as much as fetching them
        self.draws = not isinstance(base.dataset if isinstance(base, Subset) else base, TensorDataset)

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        if not self.draws:
            image, label = self.base[index]
            return image, self._label(label)
        with keyed(self.seed, epoch, index):
            image, label = self.read(index)
            image = image if self.transform is None else self.transform(image)
        if not isinstance(image, Tensor):
            raise TypeError(f"data must yield image tensors [C, H, W]; got {type(image).__name__} for image {index}")
        return image, label

    def read(self, index: int) -> tuple[Any, Any]:
        """The image before the transform, and its label; every error of decoding is reported as a bad image."""
        if self.mode is None:
            image, label = self.base[index]
            return image, self._label(label)
        if index >= len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            image, label = self.base[index]
            image = eight_bits(image, self.mode) if hasattr(image, "convert") else image
        except BadImageError:
            raise
        except Exception as error:
            raise BadImageError(f"data: cannot read image {index}: {str(error) or type(error).__name__}") from error
        return image, self._label(label)

    @property
    def targets(self) -> Tensor | None:
        """All labels [n]; None if they are unknown without loading images."""
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
    """Batches of (index, epoch) in an order that depends only on (seed, epoch). Set `epoch` and `start` before use.

    Args:
        length: of the dataset.
        batch_size: of every batch; an incomplete last batch is dropped.
        batches: number of batches per epoch.
        seed: of the order.
        rows: the rows of every batch to yield, for several processes; None: all.
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
    """A DataLoader over EpochBatches, or in order with a batch size; it does not use the global generators.

    CachedImages that make batches on a GPU do so in this process.
    """
    whole = data
    while isinstance(whole, Subset):
        whole = whole.dataset
    if getattr(whole, "batch_device", torch.device("cpu")).type == "cuda":
        workers, device = 0, "cpu"
    how: dict[str, Any] = {"batch_sampler": batches} if isinstance(batches, EpochBatches) else {"batch_size": batches}
    return DataLoader(
        data,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=persistent and workers > 0,
        # Ctrl-C reaches the whole process group; only the main process handles it
        worker_init_fn=_ignore_interrupt,
        # without its own generator, each iteration draws from the global one and changes dropout
        generator=torch.Generator().manual_seed(0),
        **how,
    )


def _collated(found: Any) -> Any:
    """Samples → a batch; CachedImages give whole batches."""
    return found if isinstance(found, tuple) else default_collate(found)


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def hold_out(data: Dataset[Any], fraction: float, seed: int) -> tuple[Subset[Any], Subset[Any] | None]:
    """Split off a random fraction for validation; (train, validation), where validation is None for a fraction of 0.

    If the data has `groups` [n] (photos.Crops: images with common pixels), whole groups are drawn until there are
    enough images.
    """
    total = len(data)  # type: ignore[arg-type]
    count = round(fraction * total)
    _, group, sizes = torch.unique(
        getattr(data, "groups", torch.arange(total)), return_inverse=True, return_counts=True
    )
    order = torch.randperm(len(sizes), generator=generator(seed))
    before = sizes[order].cumsum(0) - sizes[order]  # number of images in the groups before each
    held = torch.isin(group, order[before < count])  # [n]
    if fraction and not 0 < held.sum() < total:
        raise ValueError(f"val_fraction {fraction:g} of {total} training images leaves one part empty")
    rest, chosen = ((held == part).nonzero().flatten().tolist() for part in (False, True))
    return Subset(data, rest), Subset(data, chosen) if chosen else None


def seed_everything(*key: int) -> None:
    """Seed torch's, NumPy's and Python's global generators from integers such as (seed, step)."""
    import numpy

    seed = generator(*key).initial_seed()
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def keyed(*key: int) -> Iterator[None]:
    """Seed the global generators by the key inside the block, and restore them afterwards."""
    with preserved():
        seed_everything(*key)
        yield


def _timm_name(data: str) -> bool:
    prefix = data.partition("/")[0].lower()
    if prefix in _STREAMS and not os.path.isdir(data):
        raise ValueError(
            f"data {data!r} is a stream, which cannot be resumed exactly; use {' or '.join(TIMM_PREFIXES)}, a "
            "folder of images, or pass a dataset as train_data"
        )
    return prefix in TIMM_PREFIXES and "/" in data and not os.path.isdir(data)


def _timm_dataset(name: str, root: str | None, split: str, download: bool) -> Any:
    if root is None and not name.lower().startswith("hfds/"):  # Hugging Face has its own cache
        raise ValueError(f"data {name!r} needs data_dir (--data-dir), the folder where timm keeps it")
    try:
        found = import_timm().data.create_dataset(name, root=root, split=split, download=download)
    except (AssertionError, RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
        raise ValueError(f"data {name!r} (data_dir {root!r}, download {download}) cannot be opened: {error}") from error
    # timm would silently skip unreadable images, and clip more than 8 bits to white
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
