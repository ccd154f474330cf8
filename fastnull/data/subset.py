"""A part of a data set that stands for the whole: drawn evenly over its classes."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from fastnull.rng import generator


def even_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw `count` images, from every class as many as from every other, as far as the classes reach.

    It depends on which images share a class, on their order and on the seed alone: not on how the classes are
    numbered, so it is the same for every model. A smaller subset lies within every larger one of the same seed.

    Args:
        labels: classes [n], integers.
        count: images to draw; all of them where there are no more.
        seed: of the draw.

    Returns:
        indices [min(count, n)] int64 on the CPU, ascending.

    Raises:
        ValueError: labels of another shape or dtype, or a count below 1.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers [n]; got {labels.dtype} {list(labels.shape)}")
    if count < 1:
        raise ValueError(f"count must be >= 1; got {count!r}")
    total = len(labels)
    if count >= total:
        return torch.arange(total)
    shuffled = torch.randperm(total, generator=generator(seed))
    _, classes, sizes = labels.cpu()[shuffled].unique(return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)
    first = sizes.cumsum(0) - sizes  # [classes], where each begins in by_class
    # the first image of every class, then the second of each, and so on
    turn = torch.empty_like(classes)
    turn[by_class] = torch.arange(total) - first[classes[by_class]]
    return shuffled[turn.argsort(stable=True)[:count]].sort().values


def labels_of(data: Any) -> Tensor | None:
    """The classes [n] of a data set that has a list of them: tensors, torchvision's, timm's and our folders of images,
    and Hugging Face's through timm.

    They tell classes apart, as `even_subset` needs it; a transform of labels is not applied.

    Returns:
        integers [n], or None where every image would have to be loaded for them.
    """
    if isinstance(data, Subset):
        whole = labels_of(data.dataset)
        return None if whole is None else whole[torch.as_tensor(list(data.indices), dtype=torch.int64)]
    if isinstance(data, ConcatDataset):
        parts = [labels_of(part) for part in data.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if known and len(known) == len(parts) else None
    if isinstance(data, TensorDataset):
        return _integers(data.tensors[1], data) if len(data.tensors) > 1 else None
    found = _integers(getattr(data, "targets", None), data)
    for holder, name in ((data, "files"), (data, "samples"), (getattr(data, "reader", None), "samples")):
        pairs = getattr(holder, name, None)
        if found is None and isinstance(pairs, list) and pairs and all(_is_pair(pair) for pair in pairs):
            found = _integers([label for _, label in pairs], data)
    reader: Any = getattr(data, "reader", None)
    columns: Any = getattr(reader, "dataset", None)
    if found is None and hasattr(columns, "features"):
        found = _integers(list(columns[getattr(reader, "label_key", "label")]), data)
    if found is None:
        inner = getattr(data, "base", None) or getattr(data, "files", None)  # what a transform wraps
        found = None if inner is None or inner is data or isinstance(inner, list) else labels_of(inner)
    return found


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2


def _integers(values: Any, data: Any) -> Tensor | None:
    """Values as integers, if they are a list of one for each item of the data."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    fits = found.ndim == 1 and isinstance(data, Sized) and len(found) == len(data)
    return found if fits and not found.is_floating_point() and not found.is_complex() else None
