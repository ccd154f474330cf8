"""What the callbacks for Lightning under its two names share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastnull.augment import NullspaceAugment
from fastnull.integrations.run import AugmentedRun, MakeAugment


class LightningHooks:
    """Noise in every training forward of a LightningModule's ViT, a new universal bank each epoch, and exact resume.

    The key of a batch's noise is its number since training began, not what has been drawn so far: it does not matter
    whether a run was stopped. Processes have keys of their own.

    Args:
        augment: makes the augmentation from the LightningModule when fitting begins, on its device:
            `lambda module: NullspaceAugment(module.vit, mode="boundary")`.
        batches: universal mode: see fastnull.integrations.run.AugmentedRun.
        attach: False where `training_step` calls `augment.loss` itself.
    """

    def __init__(
        self, augment: MakeAugment, batches: Tensor | Iterable[Any] | None = None, *, attach: bool = True
    ) -> None:
        super().__init__()
        self.run = AugmentedRun(augment, batches, attach)

    @property
    def augment(self) -> NullspaceAugment:
        """The augmentation, once fitting has begun."""
        return self.run.augment

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the augmentation."""
        self.run.begin(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn where the model is in eval mode, in which noise is off: Lightning leaves modes as it finds them."""
        if not self.augment.encoder.vit.model.training:
            warnings.warn(
                "fastnull: the model is in eval mode when training begins (as from_pretrained returns it), where noise "
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
        """Take the noise out of the model."""
        self.run.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the noise out of the model."""
        self.run.end()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning's checkpoints keep."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.run.load_state_dict(state_dict)
