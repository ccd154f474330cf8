"""The images of a measurement in batches, from any position on and split over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from fastnull.checks import check_images
from fastnull.data.image_files import BAD
from fastnull.data.subset import even_subset, labels_of
from fastnull.rng import preserved


class Batch(NamedTuple):
    """Images [B, C, H, W], their labels [B] and indices in the data [B], and the indices of unreadable images."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[int]


class EvaluationData:
    """A fixed sequence of images.

    Args:
        data: images [n, C, H, W] in [0, 1] and classes [n]; or a map-style data set of such pairs; or a DataLoader of
            such batches, in a fixed order.
        batch_size: of tensors and data sets; a DataLoader has its own.
        limit: number of images to use, drawn evenly over the classes (`fastnull.data.subset.even_subset`).
        device: of the batches.
        workers: processes that load a data set.
        seed: of that draw.

    Attributes:
        total: number of images; None if unknown.
        indexed: whether images can be fetched by index, which several processes need. Images of a DataLoader are
            numbered in the order in which it yields them.

    Raises:
        TypeError: data of an unknown kind.
        ValueError: no images, a DataLoader that shuffles, pixels outside [0, 1], a limit for a stream.
    """

    def __init__(
        self, data: Any, batch_size: int, limit: int | None, device: torch.device, workers: int = 0, seed: int = 0
    ) -> None:
        self.batch_size, self.device, self.workers = batch_size, device, workers
        self.data = data
        self.total: int | None
        self.indexed = not isinstance(data, DataLoader)
        order: list[Any] | None = None
        if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            images, labels = data
            if labels.shape != images.shape[:1]:
                raise ValueError(f"labels must be classes [{len(images)}]; got shape {list(labels.shape)}")
            self.total = len(images)
        elif isinstance(data, DataLoader):
            order = _fixed_order(data)
            # a user's collate function may drop images; without batches an item can have any size
            counted = order is not None and data.batch_sampler is not None and data.collate_fn is default_collate
            self.total = len(order) if order is not None and counted else None
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
            self.total = len(data)
        else:
            raise TypeError(
                f"data must be a pair of tensors (images, labels), a data set with a length or a DataLoader; "
                f"got {type(data).__name__}"
            )
        self.chosen: Tensor | None = None
        """Indices of the images to use [total], ascending; None: all."""
        if limit is not None and self.total != 0 and (self.total is None or limit < self.total):
            self.chosen = even_subset(self._labels(order), limit, seed)
            self.total = len(self.chosen)
        if next(self.batches(), None) is None:
            raise ValueError("data must hold at least one image; got none")

    def batches(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches from image `start` on; process `rank` of `world` gets every world-th batch."""
        if self.indexed:
            yield from self._by_number(start, rank, world)
        else:
            yield from self._from_loader(start)

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        return self.data.name(index) if hasattr(self.data, "name") else f"image {index}"

    def _by_number(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        assert self.total is not None
        firsts = range(start + rank * self.batch_size, self.total, world * self.batch_size)
        parts = [slice(first, min(first + self.batch_size, self.total)) for first in firsts]
        # slicing a tensor does not copy
        rows: list[Any] = parts if self.chosen is None else [self.chosen[part] for part in parts]
        numbers = [torch.arange(part.start, part.stop) for part in parts] if self.chosen is None else rows
        found: Iterable[Any]
        if isinstance(self.data, Dataset):
            # without its own generator a DataLoader draws from the global one
            found = DataLoader(
                self.data,
                batch_sampler=[some.tolist() for some in numbers],
                num_workers=self.workers,
                generator=torch.Generator().manual_seed(0),
            )
        else:
            images, labels = self.data
            found = ((images[some], labels[some]) for some in rows)
        for some, pair in zip(numbers, found, strict=True):
            yield self._batch(pair, some)

    def _from_loader(self, start: int) -> Iterator[Batch]:
        seen, left = 0, start
        for pair in self.data:
            images, labels = _pair(pair)
            numbers = torch.arange(seen, seen + len(images))
            seen += len(images)
            if self.chosen is not None:
                numbers = numbers[torch.isin(numbers, self.chosen)]
            skipped = min(left, len(numbers))
            left, numbers = left - skipped, numbers[skipped:]
            if len(numbers):
                rows = numbers - (seen - len(images))
                whole = len(rows) == len(images)
                yield self._batch((images, labels) if whole else (images[rows], labels[rows]), numbers)
            if self.chosen is not None and seen > int(self.chosen[-1]):
                return

    def _labels(self, order: list[Any] | None) -> Tensor:
        """Classes of all images [n], taken from the data set's own list if it has one."""
        if isinstance(self.data, DataLoader):
            if isinstance(self.data.dataset, IterableDataset):
                raise ValueError(
                    "limit draws evenly over the classes, and a stream (IterableDataset) has no index: give a "
                    "map-style data set, or a stream of the images to use"
                )
            known = labels_of(self.data.dataset) if self.total is not None else None
            if known is not None and order is not None and all(isinstance(number, int) for number in order):
                return known[torch.tensor(order)]
            found = [_pair(pair)[1] for pair in self.data]
            return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
        if not isinstance(self.data, Dataset):
            return self.data[1]
        known = labels_of(self.data)
        if known is not None:
            return known
        own = torch.Generator().manual_seed(0)
        every = DataLoader(self.data, self.batch_size, num_workers=self.workers, generator=own)
        return torch.cat([_pair(pair)[1] for pair in every])

    def _batch(self, pair: Any, indices: Tensor) -> Batch:
        images, labels = _pair(pair)
        check_images(images)
        bad: list[int] = []
        if getattr(self.data, "skip_bad", False) and bool((labels == BAD).any()):
            readable = labels != BAD
            bad = indices[~readable].tolist()
            images, labels, indices = images[readable], labels[readable], indices[readable]
        images, labels, indices = (part.to(self.device, non_blocking=True) for part in (images, labels, indices))
        return Batch(images, labels, indices, bad)


def _pair(pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"data must yield pairs (images, labels); got {type(pair).__name__}")
    images, labels = pair
    for name, part in (("images", images), ("labels", labels)):
        if not isinstance(part, Tensor):
            raise TypeError(f"data must yield pairs of tensors (images, labels); the {name} are {type(part).__name__}")
    if labels.shape[:1] != images.shape[:1]:
        raise ValueError(f"data must yield a label for each of {len(images)} images; got shape {list(labels.shape)}")
    return images, labels


def _fixed_order(loader: DataLoader[Any]) -> list[Any] | None:
    """The indices that a DataLoader requests in one pass, in order; None for a stream.

    Raises:
        ValueError: the order differs between passes.
    """
    if isinstance(loader.dataset, IterableDataset):
        return None
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    known = any(isinstance(s, _SHUFFLING) or getattr(s, "shuffle", None) is True for s in samplers)
    with preserved():
        # a user's own sampler shows it only in its indices
        passes = [] if known else [_asked_for(loader) for _ in range(_PASSES)]
    if known or any(each != passes[0] for each in passes):
        raise ValueError(
            "data must come in a fixed order; this DataLoader shuffles (set shuffle=False, or give a sampler that "
            "yields the same numbers in every pass)"
        )
    return passes[0]


def _asked_for(loader: DataLoader[Any]) -> list[Any]:
    if loader.batch_sampler is None:
        return list(loader.sampler)
    return [number for batch in loader.batch_sampler for number in batch]


_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_PASSES = 3
