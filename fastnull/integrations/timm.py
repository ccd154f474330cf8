"""timm's TrainingTask with nullspace noise: CE(clean) + CE(noisy) instead of CE.

A training step:

    task = NullspaceTask(NullspaceAugment(model, mode="boundary"))
    result = task(images, labels)
    result["loss"].backward()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastnull.augment import NullspaceAugment
from fastnull.compat import import_timm
from fastnull.integrations.run import place_of

import_timm()
try:
    from timm.task import ClassificationTask
except ImportError as error:
    raise ImportError(f"this needs a timm that has timm.task (pip install -U timm): {error}") from error


class NullspaceTask(ClassificationTask):
    """A classification task whose loss is the augmentation's. EMA, compile, DDP and evaluation are timm's.

    `get_checkpoint_state` and `load_checkpoint_state` save and load the augmentation as `task_state`. In universal mode
    call `task.augment.refresh(batches)` before every epoch.

    Args:
        augment: created from the model on its device, before it is compiled.
        criterion: (logits [B, K], labels) → scalar. None: the one that timm creates from `criterion_kwargs`.
        kwargs: of ClassificationTask: criterion_kwargs, device, dtype, verbose.
    """

    def __init__(
        self,
        augment: NullspaceAugment,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(augment.model, criterion, **kwargs)
        self.augment = augment

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of the augmentation; in eval mode that of the clean images.

        Args:
            input: images [B, C, H, W], the input of the model.
            target: labels [B] or soft labels [B, K].

        Returns:
            `loss`, `output` (clean logits [B, K]; with a fraction those of the only view) and, in training, the noise's
            `influence` and `norm`.
        """
        if not self.trainable_module.training:
            return super().forward(input, target)
        self.augment.model = self.trainable_module  # compile() and prepare_distributed() wrap it
        self.augment.at(self.augment.step, place_of(input))
        loss, output = self.augment.loss(input, target, self.criterion)
        return {"loss": loss, "output": output, **self.augment.stats}

    def get_task_state(self, module: Any = None, ema: bool = False) -> dict[str, Any]:
        """The augmentation's state; empty for the EMA model, which has no noise."""
        return {} if ema else self.augment.state_dict()

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: Any = None, ema: bool = False
    ) -> None:
        """Load a state of `get_task_state`; a checkpoint of another task has none."""
        if state and not ema:
            self.augment.load_state_dict(state)
