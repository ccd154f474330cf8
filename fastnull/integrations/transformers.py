"""Hugging Face's Trainer with nullspace noise: a Trainer with the two-view loss, and a callback for any Trainer.

Usage:

    trainer = NullspaceTrainer(model, args, train_dataset=data)
    trainer.train()
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.compat import import_timm
from fastnull.integrations.run import AugmentedRun, MakeAugment, place_of
from fastnull.record import replacing
from fastnull.vit.base import NormalizedModel, logits_of, unwrap

import_timm()  # the Trainer imports torchvision
from transformers import PreTrainedModel, Trainer, TrainerCallback  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

FILE = "fastnull_augment.pt"
"""File in every checkpoint folder."""


def in_tokens(model: nn.Module) -> NullspaceAugment:
    """Boundary noise at the patch embedding, because noise in pixels needs images that are not normalised."""
    return NullspaceAugment(model, site="patch")


class NullspaceCallback(TrainerCallback):
    """Noise in every training forward of any Trainer, a new universal bank each epoch, and exact resume.

    Args:
        augment: creates the augmentation from the model when training starts, such as
            `lambda model: NullspaceAugment(model, mode="boundary", site="patch", steps=5)`.
        batches: universal mode: see fastnull.integrations.run.AugmentedRun.
        attach: False if the Trainer calls `augment.loss` itself, as NullspaceTrainer does.

    Attributes:
        checkpoint: folder to resume from. None: output_dir/checkpoint-N for a Trainer that resumes at step N.
    """

    def __init__(
        self,
        augment: MakeAugment = in_tokens,
        batches: Tensor | Iterable[Any] | None = None,
        *,
        attach: bool = True,
    ) -> None:
        self.run = AugmentedRun(augment, batches, attach)
        self.checkpoint: str | os.PathLike[str] | None = None

    @property
    def augment(self) -> NullspaceAugment:
        """The augmentation, after training has started."""
        return self.run.augment

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the augmentation.

        Raises:
            FileNotFoundError: training resumes from a checkpoint without a state of the augmentation.
            RuntimeError: the Trainer splits batches over several GPUs of one process.
        """
        if args.n_gpu > 1:
            raise RuntimeError(
                f"the Trainer copies the model to {args.n_gpu} GPUs of one process (DataParallel), where noise is not "
                "supported: start one process per GPU (torchrun, accelerate launch) or set CUDA_VISIBLE_DEVICES to one"
            )
        if state.global_step > 0:
            folder = self.checkpoint or Path(args.output_dir, f"checkpoint-{state.global_step}")
            if not Path(folder, FILE).is_file():
                raise FileNotFoundError(
                    f"training resumes at step {state.global_step}, but there is no {FILE} in {folder}: set the "
                    "callback's `checkpoint` if training resumes from another folder"
                )
            self.run.load_state_dict(torch.load(Path(folder, FILE), map_location="cpu", weights_only=True))
            _load_if_renamed(kwargs["model"], Path(folder))
        self.run.begin(kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn a new universal bank."""
        self.run.start_epoch(int(state.epoch or 0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the augmentation's state in the checkpoint."""
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", FILE)
            with replacing(path) as beside:
                torch.save(self.run.state_dict(), beside)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the noise from the model."""
        self.run.end()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _load_if_renamed(kwargs["model"], Path(state.best_model_checkpoint))


class NullspaceTrainer(Trainer):
    """A Trainer for image classifiers whose training loss is that of the clean view plus that of the noisy view.

    The loss of a view is that of Trainer: the model's own (`config.problem_type`: single label, multi label or
    regression), `compute_loss_func`, or label smoothing, normalised over an accumulated batch. For other loss functions
    see `criterion`. In evaluation the loss is that of the clean images.

    Args:
        args, kwargs: of Trainer.
        augment, batches: of NullspaceCallback.
        criterion: (logits [B, K], labels) → mean, instead of the model's own loss, averaged over the parts of an
            accumulated batch. Soft labels [B, K] need one, because transformers treats float labels as multi-label. A
            model without a loss gets cross entropy with the training arguments' label_smoothing_factor.

    Batches are dictionaries with `pixel_values` [B, C, H, W], the input of the model, and `labels`.
    """

    def __init__(
        self,
        *args: Any,
        augment: MakeAugment = in_tokens,
        batches: Tensor | Iterable[Any] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if criterion is not None and self.compute_loss_func is not None:
            raise ValueError("give either criterion or compute_loss_func, not both")
        if criterion is None and self.compute_loss_func is None:
            criterion = _missing_loss(unwrap(self.model), self.args.label_smoothing_factor)
        self.criterion = criterion
        if criterion is not None:
            # the loss is a mean over its batch, whatever keywords the model's forward has
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False
        self.nullspace = NullspaceCallback(augment, batches, attach=False)
        self.add_callback(self.nullspace)

    @property
    def augment(self) -> NullspaceAugment:
        """The augmentation, after training has started."""
        return self.nullspace.augment

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer.train, which also sets the checkpoint of the callback."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True  # none: the Trainer raises
        self.nullspace.checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of both views (with a fraction, of the only view) in training, of clean images in evaluation."""
        if model.training:
            if "pixel_values" not in inputs:
                raise ValueError(f"batches must hold the images as pixel_values; got the keys {list(inputs)}")
            images = inputs["pixel_values"]
            self.augment.at(self.augment.step, place_of(images))
            views = self.augment.outputs(images, lambda: self._view(model, inputs, num_items_in_batch))
        else:
            views = [self._view(model, inputs, num_items_in_batch)]
        loss = sum(view.loss for view in views)
        return (loss, views[0].outputs) if return_outputs else loss

    def _view(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> _View:
        """One forward of the model, and its loss."""
        inputs = dict(inputs)  # Trainer removes the labels
        if self.criterion is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return _View(loss, logits_of(outputs), outputs)
        labels = inputs.pop("labels")
        logits = logits_of(model(**inputs) if _takes(model, "pixel_values") else model(inputs["pixel_values"]))
        loss = self.criterion(logits, labels)
        return _View(loss, logits, {"loss": loss, "logits": logits})


@dataclass(frozen=True)
class _View:
    loss: Tensor
    logits: Tensor  # [B, K]
    outputs: Any  # as Trainer.compute_loss returns them


def _missing_loss(model: nn.Module, smoothing: float) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The criterion for a model whose forward has no labels; None for one that has."""
    if _takes(model, "labels"):
        return None
    network: Any = model.network if isinstance(model, NormalizedModel) else model
    kind = getattr(getattr(network, "config", None), "problem_type", None)
    if kind is not None and hasattr(network, "loss_function") and not smoothing:
        return lambda logits, labels: network.loss_function(labels, logits, network.config)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model without wrappers has a parameter of that name."""
    return name in inspect.signature(type(unwrap(model)).forward).parameters


def _load_if_renamed(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint whose names are not the model's.

    transformers 5.23 saves ViT, DeiT, DINOv2, BEiT and Swin with the names of their published weights, and its Trainer
    does not load them on resume (it only warns). `from_pretrained` converts them.
    """
    from safetensors import safe_open

    file = folder / "model.safetensors"
    if not isinstance(model, PreTrainedModel) or not file.is_file():
        return
    with safe_open(file, framework="pt") as saved:
        known = set(saved.keys()) <= set(model.state_dict())
    if not known:
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())
