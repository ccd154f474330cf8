"""Checked labels, and the accuracy on the held-out images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fastnull.checks import as_labels, check_images
from fastnull.data.cache import CachedImages
from fastnull.data.image_files import to_pixels
from fastnull.data.sources import Samples, loader
from fastnull.data.subset import even_subset, labels_of
from fastnull.distributed.processes import Processes
from fastnull.finetune.training import Training

CHECK_BATCHES = 4
"""Number of held-out batches for the influence of a universal noise."""


def held_out_loaders(
    training: Training, validation: Samples | CachedImages | None
) -> tuple[DataLoader[Any] | None, DataLoader[Any] | None]:
    """This process's held-out batches, and in universal mode those for the influence of the noise; None without any."""
    if validation is None:
        return None, None
    config, processes = training.config, training.processes
    shard, size = _shard(validation, processes), -(-config.batch_size // processes.world)
    held_out = loader(shard, size, workers=config.workers, device=training.device)
    if config.augment != "universal":
        return held_out, None
    even = _even(shard, CHECK_BATCHES * size, config.seed)
    return held_out, loader(even, size, workers=config.workers, device=training.device)


def checked_labels(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Check a batch on the host, before it is moved to the device, and return its labels for training."""
    if images.dtype != torch.uint8:
        check_images(images)
    return as_labels(labels, num_classes, len(images))


@torch.no_grad()  # not inference_mode: FSDP2 could not use its buffers in training afterwards
def validate(training: Training, batches: DataLoader[Any], num_classes: int) -> float:
    """Top-1 accuracy in %, in eval mode."""
    model = training.evaluated
    model.eval()
    correct, total = torch.zeros((), dtype=torch.long, device=training.device), 0
    # gathering weights is collective: all processes run as many forwards as the one with the most batches
    more = training.processes.greatest(len(batches)) - len(batches) if training.sharded else 0
    for images, labels in batches:
        labels = checked_labels(images, labels, num_classes)
        classes = labels.argmax(1) if labels.ndim == 2 else labels  # soft labels: the most likely class
        with training.autocast():
            logits = model(to_pixels(images, training.device))
        correct += (logits.argmax(1) == classes.to(training.device)).sum()
        total += len(labels)
    for _ in range(more):
        with training.autocast():
            model(to_pixels(images, training.device))
    counts = training.processes.total(torch.stack([correct, torch.full_like(correct, total)]))
    return 100 * int(counts[0]) / int(counts[1])


def _shard(validation: Samples | CachedImages, processes: Processes) -> Dataset[Any]:
    """The held-out images of this process: every world-th one."""
    if processes.alone:
        return validation
    if len(validation) < processes.world:
        raise ValueError(f"{processes.world} processes need a held-out image each; there are {len(validation)}")
    return Subset(validation, range(processes.rank, len(validation), processes.world))


def _even(data: Dataset[Any], count: int, seed: int) -> Subset[Any]:
    """`count` images, drawn evenly over the classes if these are known."""
    labels = labels_of(data)
    if labels is None:
        labels = torch.zeros(len(data), dtype=torch.long)  # type: ignore[arg-type]
    return Subset(data, even_subset(labels, count, seed).tolist())
