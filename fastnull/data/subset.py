"""A subset of a data set, drawn evenly over its classes."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from fastnull.rng import generator


def even_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw `count` images, the same number from every class as far as the classes have enough.

    The result depends only on which images have the same class, on their order and on the seed, not on the numbers of
    the classes, so it is the same for every model. A subset contains every smaller one of the same seed.

    Args:
        labels: classes [n], integers.
        count: number of images to draw; at most n are drawn.
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
    first = sizes.cumsum(0) - sizes  # [classes], first position of each in by_class
    # the first image of every class, then the second of each, and so on
    turn = torch.empty_like(classes)
    turn[by_class] = torch.arange(total) - first[classes[by_class]]
    return shuffled[turn.argsort(stable=True)[:count]].sort().values


def labels_of(data: Any) -> Tensor | None:
    """The class of each image, without loading the images; a transform of labels is not applied.

    Supported are tensors, folders of images (torchvision, timm, this package) and Hugging Face's data through timm.

    Returns:
        integers [n], or None if the images would have to be loaded.
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
        if found is None and pairs and isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs):
            found = _integers([pair[1] for pair in pairs if len(pair) == 2], data)
    reader: Any = getattr(data, "reader", None)
    columns: Any = getattr(reader, "dataset", None)
    if found is None and hasattr(columns, "features"):
        found = _integers(list(columns[getattr(reader, "label_key", "label")]), data)
    if found is None:
        inner = getattr(data, "base", None) or getattr(data, "files", None)  # of a data set with a transform
        found = None if inner is None or inner is data or isinstance(inner, list) else labels_of(inner)
    return found


def _integers(values: Any, data: Any) -> Tensor | None:
    """Values as integers if there is one per item of the data, else None."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    fits = found.ndim == 1 and isinstance(data, Sized) and len(found) == len(data)
    return found if fits and not found.is_floating_point() and not found.is_complex() else None
