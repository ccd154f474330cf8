"""Autocast, memory formats, default dtypes and torch.compile change the result by rounding only."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.config import ATTACKS
from fastnull.models import create_model
from fastnull.vit import SITES
from tests.finetune.runs import (
    MIXED,
    SGD,
    small,
    weights_of,
)


def test_bfloat16_autocast(few):
    result = finetune(small("boundary", num_classes=10, amp="bfloat16"), train_data=few)
    assert all(math.isfinite(record["loss"]) for record in result.history)
    assert next(result.model.parameters()).dtype == torch.float32


def test_float16_with_scaled_gradients(few):
    """The same losses as in float32, to float16's bits: unscaled before they are clipped."""
    config = small("boundary", num_classes=10, clip_grad=0.1, val_fraction=0.0, backend="reference")
    plain, half = (finetune(replace(config, amp=amp), train_data=few) for amp in (None, "float16"))
    assert [r["loss"] for r in half.history] == pytest.approx([r["loss"] for r in plain.history], rel=2e-2)
    assert next(half.model.parameters()).dtype == torch.float32


SITED = [
    *((augment, site) for augment in ("random", "universal", "per_image", "boundary") for site in SITES),
    *((augment, "patch") for augment in ("none", *ATTACKS)),
]


@pytest.mark.filterwarnings("ignore:the universal noise")
@pytest.mark.parametrize("fraction", [0.0, 0.5], ids=["two views", "one view"])
@pytest.mark.parametrize(("augment", "site"), SITED)
def test_every_augmentation_takes_channels_last(few, augment, site, fraction):
    if fraction and augment in ("none", "trades"):
        pytest.skip("has no fraction")
    config = small(
        augment, SGD, noise={"limit": 0.05, "step_size": 0.01}, site=site, epochs=1, num_classes=10,
        noise_fraction=fraction,
    )  # fmt: skip
    plain = finetune(config, None, few)
    laid = (few[0].to(memory_format=torch.channels_last), few[1])
    last = finetune(replace(config, channels_last=True), None, laid)
    weight = last.model.network.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert [r["loss"] for r in last.history] == pytest.approx([r["loss"] for r in plain.history], rel=1e-3)
    torch.testing.assert_close(weights_of(last), weights_of(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the universal noise")
@pytest.mark.parametrize(("augment", "site"), SITED)
@pytest.mark.parametrize(
    "changes", [{}, {**MIXED, "accumulate": 2, "drop_path": 0.2, "ema_decay": 0.9}], ids=["plain", "all"]
)
def test_another_default_dtype_changes_nothing(few, augment, site, changes):
    """torch.set_default_dtype is for what is made without a dtype; the model has one."""
    config = small(
        augment, SGD, noise={"limit": 0.05, "step_size": 0.01}, site=site, epochs=1, num_classes=10, **changes
    )
    model = create_model("vit_digits", num_classes=10)
    right = finetune(config, copy.deepcopy(model), few)
    torch.set_default_dtype(torch.float64)
    try:
        found = finetune(config, copy.deepcopy(model), few)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in found.model.parameters()} == {torch.float32}
    # the start of an attack is drawn in the default dtype
    rounding = 1e-2 if augment in ATTACKS else 1e-5
    assert found.history[-1]["loss"] == pytest.approx(right.history[-1]["loss"], rel=rounding)


def test_a_model_of_a_float64_default_learns():
    torch.set_default_dtype(torch.float64)
    try:
        result = finetune(
            FinetuneConfig(augment="boundary", epochs=1, train_fraction=0.1, batch_size=16, progress=False)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in result.model.parameters()} == {torch.float64}


@pytest.mark.parametrize(("channels", "batch"), [(1, 8), (3, 2)])
def test_channels_last_in_odd_shapes(few, channels, batch):
    """One channel is contiguous in both formats, and so are the strides of one image."""
    data = (few[0][:, :channels].to(memory_format=torch.channels_last), few[1])
    config = replace(
        SGD, epochs=1, batch_size=batch, augment="boundary", site="pixels", num_classes=10, channels_last=True,
        train_fraction=0.2,
    )  # fmt: skip
    model = create_model("vit_digits", num_classes=10, channels=channels)
    assert math.isfinite(finetune(config, model, data).history[-1]["loss"])


def test_compiled_training_is_the_same(tmp_path, few, monkeypatch):
    """Graphs are captured and run as they are, which takes seconds less than generating code for them."""
    compiled = []
    original = torch.compile

    def eagerly(model):
        compiled.append(model)
        return original(model, backend="eager")

    monkeypatch.setattr(torch, "compile", eagerly)
    config = small("boundary", num_classes=10)
    plain = finetune(config, train_data=few)
    result = finetune(replace(config, compile=True, out=str(tmp_path)), train_data=few)
    assert len(compiled) == 1
    assert [r["loss"] for r in result.history] == pytest.approx([r["loss"] for r in plain.history], rel=1e-3)
    assert not any("_orig_mod" in name for name in load_file(result.last_path))
