"""Common part of the callbacks for Lightning's two packages."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastnull.augment import NullspaceAugment
from fastnull.integrations.run import AugmentedRun, MakeAugment


class LightningHooks:
    """Noise in every training forward of a LightningModule's ViT, a new universal bank each epoch, and exact resume.

    The noise of a batch depends only on its number since the start of training and on the process, so a run can be
    resumed.

    Args:
        augment: creates the augmentation from the LightningModule, on its device, when fitting starts:
            `lambda module: NullspaceAugment(module.vit, mode="boundary")`.
        batches: universal mode: see fastnull.integrations.run.AugmentedRun.
        attach: False if `training_step` calls `augment.loss` itself.
    """

    def __init__(
        self, augment: MakeAugment, batches: Tensor | Iterable[Any] | None = None, *, attach: bool = True
    ) -> None:
        super().__init__()
        self.run = AugmentedRun(augment, batches, attach)

    @property
    def augment(self) -> NullspaceAugment:
        """The augmentation, after fitting has started."""
        return self.run.augment

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the augmentation."""
        self.run.begin(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn if the model is in eval mode, where noise is off; Lightning does not change modes."""
        if not self.augment.encoder.vit.model.training:
            warnings.warn(
                "fastnull: the model is in eval mode when training starts (as from_pretrained returns it), so noise "
                "is off: call its train() before fit()",
                stacklevel=2,
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Learn a new universal bank."""
        self.augment.at((trainer.fit_loop.epoch_loop.total_batch_idx + 1) * trainer.world_size)
        self.run.start_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the key of the batch's noise."""
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.augment.at(number * trainer.world_size + trainer.global_rank)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the noise from the model."""
        self.run.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the noise from the model."""
        self.run.end()

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoints."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state."""
        self.run.load_state_dict(state_dict)
