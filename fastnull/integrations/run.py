"""A NullspaceAugment over a training run that a library's callbacks describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.distributed.processes import Processes
from fastnull.rng import Place

MakeAugment = Callable[[Any], NullspaceAugment]
"""Makes the augmentation from the library's model, once that lies on its device."""


class AugmentedRun:
    """Makes the augmentation when training begins, attaches it, learns its bank anew each epoch, and keeps its state.

    Args:
        make: see MakeAugment.
        batches: universal mode: images to learn the bank from, see NullspaceAugment.refresh. On several processes all
            give equally many batches, the same ones or each its own.
        attach: whether every training forward of the model sees noise; without, the loop calls `augment.loss`.
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
            RuntimeError: training has not begun.
        """
        if self._augment is None:
            raise RuntimeError("the augmentation is made when training begins; it has not begun")
        return self._augment

    def begin(self, model: nn.Module) -> None:
        """Make the augmentation of a new run, or go on from a state that was loaded."""
        self.end()  # the last run may have broken off (auto_find_batch_size begins anew after an error)
        self._augment = augment = self._make(model)
        self._epoch = None
        if augment.mode == "universal" and self._batches is None:
            raise ValueError("universal mode needs batches=, images that its noise is learnt from in every epoch")
        if self._loaded is not None:
            augment.load_state_dict(self._loaded["augment"])
            self._epoch, self._loaded = self._loaded["epoch"], None
        if self._attach:
            augment.attach()

    def end(self) -> None:
        """The model is as it was before; the augmentation stays for whoever reads its statistics."""
        if self._augment is not None:
            self._augment.detach()

    def start_epoch(self, epoch: int) -> None:
        """Universal mode: learn the bank for an epoch, unless it was resumed with the bank it began with."""
        if self.augment.mode == "universal" and epoch != self._epoch:
            assert self._batches is not None
            processes = Processes()
            self.augment.refresh(self._batches, mean=None if processes.alone else processes.mean)
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs; tensors and plain values only. Empty before training."""
        if self._augment is None:
            return {}
        return {"augment": self._augment.state_dict(), "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, when training begins."""
        self._loaded = state or None


def place_of(images: Tensor) -> Place | None:
    """Where this process's images lie in the batch of all processes, so that no two get the same noise."""
    processes = Processes()
    return processes.places(len(images) * processes.world, 1)[0]
