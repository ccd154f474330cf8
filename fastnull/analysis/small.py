"""Small models, analysed if no model is given."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastnull.checks import check_choice
from fastnull.data.sources import EMBEDDED
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.loop import finetune
from fastnull.models import create_model
from fastnull.rng import generator

EPOCHS = {"digits": 30, "photos": 10}
"""Epochs of training, about ten seconds on one core."""
MORE_EPOCHS = 2


def small_model(
    data: str = "photos",
    *,
    seed: int = 0,
    epochs: int | None = None,
    start: nn.Module | None = None,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> nn.Module:
    """The small ViT of an embedded data set, trained on its clean images.

    Args:
        data: `digits` or `photos`.
        seed: of the weights and the order of the images.
        epochs: default EPOCHS.
        start: a model to train further, in place, instead of a new one.
        device: of the model.
        changes: to its architecture, such as depth=2.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: other data.
        ImportError: the package with the data is not installed.
    """
    name = EMBEDDED[check_choice("data", data, EMBEDDED)].model
    epochs = EPOCHS[data] if epochs is None else epochs
    if start is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed).initial_seed())
            start = create_model(name, **changes)
    config = FinetuneConfig(
        model=name, data=data, augment="none", epochs=epochs, lr=2e-3, warmup_epochs=0.3 * epochs, seed=seed,
        val_fraction=0.0, device=str(device), progress=False,
    )  # fmt: skip
    return finetune(config, start).model.eval()


def small_family(data: str, model: nn.Module, seed: int = 0) -> dict[str, nn.Module]:
    """Models to try the noise of `small_model(data, seed=seed)` on: the model after MORE_EPOCHS more epochs, one of
    another seed, and one with half the blocks."""
    device = next(model.parameters()).device
    return {
        "the same, trained on": small_model(
            data, seed=seed + 1, epochs=MORE_EPOCHS, start=copy.deepcopy(model), device=device
        ),
        f"seed {seed + 1}": small_model(data, seed=seed + 1, device=device),
        f"seed {seed + 2}, half as deep": small_model(data, seed=seed + 2, device=device, depth=2),
    }
