"""Hugging Face's Trainer with nullspace noise: a Trainer with the two-view loss, and a callback for any Trainer.

A Trainer, with one argument more:

    trainer = NullspaceTrainer(model, args, train_dataset=data, augment=NullspaceAugment)
    trainer.train()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.compat import import_timm
from fastnull.integrations.run import AugmentedRun, MakeAugment, place_of
from fastnull.record import replacing
from fastnull.vit.base import logits_of

import_timm()  # the Trainer imports torchvision
from transformers import PreTrainedModel, Trainer, TrainerCallback  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

FILE = "fastnull_augment.pt"
"""In every checkpoint folder."""


class NullspaceCallback(TrainerCallback):
    """Noise in every training forward of any Trainer, a new universal bank each epoch, and exact resume.

    Args:
        augment: makes the augmentation from the model when training begins: NullspaceAugment itself, or
            `lambda model: NullspaceAugment(model, mode="boundary", steps=5)`.
        batches: universal mode: see fastnull.integrations.run.AugmentedRun.
        attach: False where the Trainer calls `augment.loss` itself, as NullspaceTrainer does.

    Attributes:
        checkpoint: folder to resume from. None is output_dir/checkpoint-N, for a Trainer that resumes at step N.
    """

    def __init__(
        self,
        augment: MakeAugment = NullspaceAugment,
        batches: Tensor | Iterable[Any] | None = None,
        *,
        attach: bool = True,
    ) -> None:
        self.run = AugmentedRun(augment, batches, attach)
        self.checkpoint: str | os.PathLike[str] | None = None

    @property
    def augment(self) -> NullspaceAugment:
        """The augmentation, once training has begun."""
        return self.run.augment

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the augmentation.

        Raises:
            FileNotFoundError: training resumes from a checkpoint that holds no state of it.
        """
        if state.global_step > 0:
            folder = self.checkpoint or Path(args.output_dir, f"checkpoint-{state.global_step}")
            if not Path(folder, FILE).is_file():
                raise FileNotFoundError(
                    f"training resumes at step {state.global_step}, but there is no {FILE} in {folder}: set the "
                    "callback's `checkpoint` to the folder that is resumed from, if it is another one"
                )
            self.run.load_state_dict(torch.load(Path(folder, FILE), map_location="cpu", weights_only=True))
            _load_if_renamed(kwargs["model"], Path(folder))
        self.run.begin(kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn a new universal bank."""
        self.run.start_epoch(int(state.epoch or 0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the augmentation's state beside the Trainer's."""
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", FILE)
            with replacing(path) as beside:
                torch.save(self.run.state_dict(), beside)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the noise out of the model."""
        self.run.end()


class NullspaceTrainer(Trainer):
    """A Trainer for image classifiers whose training loss is criterion(clean) + criterion(noisy).

    Batches are dictionaries with `pixel_values` [B, C, H, W], as the model takes them, and `labels`. Evaluation has the
    clean loss. Gradient accumulation gives the mean over the micro-batches.

    Args:
        args, kwargs: of Trainer.
        augment, batches: of NullspaceCallback.
        criterion: (logits [B, K], labels [B] or soft [B, K]) → mean. None is cross entropy with the training
            arguments' label_smoothing_factor.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        augment: MakeAugment = NullspaceAugment,
        batches: Tensor | Iterable[Any] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # the loss is a mean over its batch, whatever keywords the model's forward takes
        self.model_accepts_loss_kwargs = False
        self.criterion = criterion or nn.CrossEntropyLoss(label_smoothing=self.args.label_smoothing_factor)
        self.nullspace = NullspaceCallback(augment, batches, attach=False)
        self.add_callback(self.nullspace)

    @property
    def augment(self) -> NullspaceAugment:
        """The augmentation, once training has begun."""
        return self.nullspace.augment

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer.train, which tells the callback what is resumed."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True  # none: the Trainer says so
        self.nullspace.checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The augmentation's loss in training, that of clean images in evaluation; on request logits too."""
        images, labels = inputs["pixel_values"], inputs["labels"]
        if model.training:
            self.augment.model = model  # as the Trainer wraps it: DDP exchanges gradients there
            self.augment.place = place_of(images)
            loss, logits = self.augment.loss(images, labels, self.criterion)
        else:
            logits = logits_of(model(images))
            loss = self.criterion(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def _load_if_renamed(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint whose names are not the model's.

    transformers 5.23 saves ViT, DeiT, DINOv2, BEiT and Swin under the names of their published weights, and its
    Trainer, resuming, looks for the model's own: weights stay fresh, with a warning. `from_pretrained` converts them.
    """
    from safetensors import safe_open

    file = folder / "model.safetensors"
    if not isinstance(model, PreTrainedModel) or not file.is_file():
        return
    with safe_open(file, framework="pt") as saved:
        known = set(saved.keys()) <= set(model.state_dict())
    if not known:
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())
