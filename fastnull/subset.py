"""A part of a data set that stands for the whole: drawn evenly over its classes."""

from __future__ import annotations

import torch
from torch import Tensor

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
