"""The images of a measurement in batches: from any point on, and shared out over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastnull.checks import check_images
from fastnull.image_files import BAD


class Batch(NamedTuple):
    """Images [B, C, H, W] with labels [B] and their numbers in the data [B], and the numbers of those left out."""

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
        limit: use the first `limit` images only.
        device: where the batches go.
        workers: processes that load a data set.

    Attributes:
        total: number of images; None where the data cannot tell.
        indexed: whether images can be asked for by number, as sharing them out needs it.

    Raises:
        TypeError: data of an unknown kind.
        ValueError: no images, a DataLoader that shuffles, pixels outside [0, 1].
    """

    def __init__(self, data: Any, batch_size: int, limit: int | None, device: torch.device, workers: int = 0) -> None:
        self.batch_size, self.limit, self.device, self.workers = batch_size, limit, device, workers
        self.total: int | None = None
        self.indexed = True
        if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            images, labels = data
            if labels.shape != images.shape[:1]:
                raise ValueError(
                    f"labels must be classes [{len(images)}], one an image; got shape {list(labels.shape)}"
                )
            self.total = len(images)
        elif isinstance(data, DataLoader):
            if isinstance(data.sampler, RandomSampler):
                raise ValueError("data must come in a fixed order; this DataLoader shuffles (set shuffle=False)")
            self.indexed = False
            if hasattr(data.dataset, "__len__") and not data.drop_last:
                self.total = len(data.dataset)
        elif isinstance(data, Dataset) and hasattr(data, "__len__"):
            self.total = len(data)
        else:
            raise TypeError(
                f"data must be a pair of tensors (images, labels), a data set with a length or a DataLoader; "
                f"got {type(data).__name__}"
            )
        if self.total is not None and limit is not None:
            self.total = min(self.total, limit)
        self.data = data
        if next(self.batches(), None) is None:
            raise ValueError("data must hold at least one image; got none")

    def batches(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches from image `start` on; of `world` processes the one with this `rank` gets every world-th of them."""
        if self.indexed:
            yield from self._by_number(start, rank, world)
        else:
            yield from self._from_loader(start)

    def name(self, index: int) -> str:
        """What an image is called in a message."""
        return self.data.name(index) if hasattr(self.data, "name") else f"image {index}"

    def _by_number(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        assert self.total is not None
        firsts = range(start + rank * self.batch_size, self.total, world * self.batch_size)
        chosen = [range(first, min(first + self.batch_size, self.total)) for first in firsts]
        found: Iterable[Any]
        if isinstance(self.data, Dataset):
            # a generator of its own: a loader would draw from the global one
            found = DataLoader(
                self.data, batch_sampler=chosen, num_workers=self.workers, generator=torch.Generator().manual_seed(0)
            )
        else:
            images, labels = self.data
            found = ((images[numbers.start : numbers.stop], labels[numbers.start : numbers.stop]) for numbers in chosen)
        for numbers, pair in zip(chosen, found, strict=True):
            yield self._batch(pair, numbers.start)

    def _from_loader(self, start: int) -> Iterator[Batch]:
        seen = 0
        for pair in self.data:
            images, labels = _pair(pair)
            first = seen
            seen += len(images)
            stop = len(images) if self.limit is None else self.limit - first
            skipped = max(0, start - first)
            if skipped < min(len(images), stop):
                yield self._batch((images[skipped:stop], labels[skipped:stop]), first + skipped)
            if self.limit is not None and seen >= self.limit:
                return

    def _batch(self, pair: Any, first: int) -> Batch:
        images, labels = _pair(pair)
        check_images(images)
        indices = torch.arange(first, first + len(images))
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
    return pair[0], pair[1]
