"""A NullspaceAugment in the training run of another library, driven by its callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.distributed.processes import Processes
from fastnull.rng import Place

MakeAugment = Callable[[Any], NullspaceAugment]
"""Creates the augmentation from the library's model, which is on its device."""


class AugmentedRun:
    """Creates the augmentation when training starts, attaches it, learns a bank in each epoch, and keeps its state.

    Args:
        make: see MakeAugment.
        batches: universal mode: images for the bank, see NullspaceAugment.refresh. Several processes must give the same
            number of batches.
        attach: add noise to every training forward of the model; False: the loop calls `augment.loss`.
    """

    def __init__(self, make: MakeAugment, batches: Tensor | Iterable[Any] | None, attach: bool) -> None:
        self._make, self._batches, self._attach = make, batches, attach
        self._augment: NullspaceAugment | None = None
        self._epoch: int | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def augment(self) -> NullspaceAugment:
        """The augmentation of this run, or of the last one.

        Raises:
            RuntimeError: training has not started.
        """
        if self._augment is None:
            raise RuntimeError("the augmentation is created when training starts, which has not happened yet")
        return self._augment

    def begin(self, model: nn.Module) -> None:
        """Create the augmentation of a new run, with the loaded state if there is one."""
        self.end()  # the last run may have failed (auto_find_batch_size starts again after an error)
        self._augment = augment = self._make(model)
        self._epoch = None
        if augment.mode == "universal" and self._batches is None:
            raise ValueError("universal mode needs batches=, the images from which its noise is learned in every epoch")
        if self._loaded is not None:
            augment.load_state_dict(self._loaded["augment"])
            self._epoch, self._loaded = self._loaded["epoch"], None
        if self._attach:
            augment.attach()

    def end(self) -> None:
        """Remove the noise from the model; the augmentation and its statistics stay."""
        if self._augment is not None:
            self._augment.detach()

    def start_epoch(self, epoch: int) -> None:
        """Universal mode: learn the bank of an epoch, unless it was resumed with its bank."""
        if self.augment.mode == "universal" and epoch != self._epoch:
            assert self._batches is not None
            processes = Processes()
            self.augment.refresh(self._batches, mean=None if processes.alone else processes.mean)
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """State for resuming, as tensors and plain values; empty before training."""
        if self._augment is None:
            return {}
        return {"augment": self._augment.state_dict(), "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict` when training starts."""
        self._loaded = state or None


def place_of(images: Tensor) -> Place | None:
    """The position of this process's images in the batch of all processes, so that no two get the same noise."""
    processes = Processes()
    return processes.places(len(images) * processes.world, 1)[0]
