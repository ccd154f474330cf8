"""Batches for learning a universal noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from fastnull.data.cache import CachedImages
from fastnull.data.image_files import to_pixels
from fastnull.data.sources import EpochBatches, Samples, loader
from fastnull.finetune.held_out import CHECK_BATCHES
from fastnull.finetune.stopping import StopRequest
from fastnull.finetune.training import Training


class RefreshBatches:
    """Training batches for universal synthesis, in an order of their own in each round."""

    def __init__(self, train: Samples | CachedImages, training: Training, stop: StopRequest) -> None:
        self._train, self._training, self._stop = train, training, stop
        self._batch_size = training.plan.batch_size
        self._round = 0

    def __len__(self) -> int:
        return len(self._train) // self._batch_size

    def __iter__(self) -> Iterator[Tensor]:
        training = self._training
        # larger than any epoch, so that augmentations differ from those of the training steps
        rows = training.processes.rows(self._batch_size)
        order = EpochBatches(len(self._train), self._batch_size, len(self), training.config.seed, rows)
        order.epoch = 2**32 + training.step * 2**16 + self._round
        self._round += 1
        for images, _ in loader(self._train, order, workers=training.config.workers, device=training.device):
            # the state at the start of this epoch is saved, and the bank will be learned again from it
            self._stop.agree()
            self._stop.leave_if_requested(training)
            yield to_pixels(images, training.device)

    def check_images(self, held_out: DataLoader[Any] | None) -> list[Tensor]:
        """Images for the influence: held-out ones, or those of a further round."""
        source = self if held_out is None else (to_pixels(images, self._training.device) for images, _ in held_out)
        return [images for images, _ in zip(source, range(CHECK_BATCHES), strict=False)]
