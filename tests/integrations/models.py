"""Small models and quiet trainers of the libraries."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from fastnull.compat import import_timm
from fastnull.integrations.transformers import Trainer

from transformers import (  # isort: skip  (after fastnull: see fastnull.compat)
    PrinterCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

LIGHTNING = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
"""Settings of Lightning's Trainer."""


def lightning_of(name: str) -> tuple[Any, Any]:
    """(the library, our callback for it)."""
    import_timm()
    ours = importlib.import_module(f"fastnull.integrations.{LIGHTNING[name]}")
    return importlib.import_module(name), ours.NullspaceCallback


def hf_model(
    kind: type[ViTForImageClassification] = ViTForImageClassification, *, num_labels: int = 10, **changes: Any
) -> ViTForImageClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **changes}
    return kind(ViTConfig(image_size=16, patch_size=4, num_labels=num_labels, initializer_range=0.2, **sizes))


def hf_trainer(
    kind: type[Trainer], folder: Path, network: nn.Module, data: Any, arguments: dict[str, Any], **extra: Any
) -> Trainer:
    """A Trainer on the CPU that prints and saves nothing."""
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings = TrainingArguments(str(folder), use_cpu=True, **{**quiet, **arguments})
    trainer = kind(network, settings, train_dataset=data, eval_dataset=data, **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer
