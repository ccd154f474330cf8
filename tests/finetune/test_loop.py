"""The loop: every augmentation learns, in every precision, memory format and default dtype; bad runs stop."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from fastnull.data import evaluation_data
from fastnull.finetune import DivergenceError, FinetuneConfig, finetune
from fastnull.finetune.config import ATTACKS, AUGMENTS
from fastnull.finetune.refresh import RefreshBatches
from fastnull.models import create_model
from fastnull.vit import SITES
from tests.finetune.runs import (
    MIXED,
    SGD,
    SMALL,
    Broken,
    metrics,
    small,
    weights_of,
)
from tests.pictures import write_pictures


@pytest.fixture(scope="module")
def half_trained():
    return finetune(FinetuneConfig(augment="none", epochs=8, lr=3e-3, batch_size=16, warmup_epochs=1, progress=False))


def test_learns_the_digits(half_trained):
    assert half_trained.history[-1]["val_accuracy"] > 70  # of ten classes, from random weights
    assert half_trained.history[-1]["loss"] < 0.5 * half_trained.history[0]["loss"]


@pytest.mark.filterwarnings("ignore:the universal noise")
@pytest.mark.parametrize("augment", AUGMENTS)
def test_every_augmentation_learns(half_trained, augment):
    config = FinetuneConfig(augment=augment, epochs=2, lr=1e-3, attack_steps=2, attack_eps=2 / 255, progress=False)
    if augment == "universal":  # small noise, or the differences between the banks of the epochs dominate the loss
        config = replace(config, noise={"limit": 0.25})
    if augment == "free":  # likewise, or the growing strength does
        config = replace(config, noise={"limit": 2 / 255, "smooth_limit": 0.0, "step_size": 2 / 255})
    result = finetune(config, copy.deepcopy(half_trained.model))
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < first["loss"]
    assert last["val_accuracy"] > 70
    assert result.best_accuracy == max(record["val_accuracy"] for record in result.history)
    assert result.model.training is False
    assert (result.seconds["synthesis"] > 0) == (augment != "none")


def test_image_folder_is_finetuned_and_evaluated(tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    config = small(
        "boundary", data=str(pictures), epochs=30, batch_size=8, val_fraction=0.2, crop_scale=0.5,
        img_size=32, lr=3e-3,
    )  # fmt: skip
    result = finetune(config)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    tested = evaluation_data(str(pictures), result.model)
    images, labels = (torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*tested, strict=True))
    assert images.shape == (12, 3, 32, 32)
    accuracy = (result.model(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.5  # cat, flower and temple differ in colour


def test_global_generators_are_left_alone(few):
    state = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    finetune(replace(SMALL, epochs=1, num_classes=10, mixup=0.2), train_data=few)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (numpy.random.get_state()[1] == state[1]).all()


def test_same_seed_same_run_other_seed_another(few):
    config = small("boundary", num_classes=10)
    losses = [[r["loss"] for r in finetune(replace(config, seed=s), train_data=few).history] for s in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_universal_noise_that_misses_eps_is_reported(tmp_path, few):
    config = small("universal", noise={"eps": 1e-9}, num_classes=10, epochs=1, out=str(tmp_path))
    with pytest.warns(UserWarning, match="did not meet eps"):
        finetune(config, train_data=few)
    (refresh,) = [line for line in metrics(tmp_path) if line["kind"] == "refresh"]
    assert refresh["converged"] == 0
    assert refresh["influence"] > 1e-9


def test_universal_noise_is_judged_on_all_classes(few, monkeypatch):
    """Of a class-sorted set the first batches would be of a class or two."""
    images, labels = few
    order = labels.argsort(stable=True)
    seen = []
    original = RefreshBatches.check_images

    def check_images(self: RefreshBatches, held_out: DataLoader) -> list[torch.Tensor]:
        seen.append([label for _, labels in held_out for label in labels.tolist()])
        return original(self, held_out)

    monkeypatch.setattr(RefreshBatches, "check_images", check_images)
    config = small("universal", num_classes=10, batch_size=3, epochs=1, noise={"rounds": 1, "eps": 2.0, "steps": None})
    finetune(config, train_data=few, val_data=(images[order], labels[order]))
    assert len(seen[0]) == 12
    assert set(seen[0]) == set(labels.tolist())


def test_nan_loss_names_its_step_and_saves_nothing_after_it(tmp_path, few):
    config = replace(SMALL, num_classes=10, log_every=100, out=str(tmp_path), epochs=4)
    with pytest.raises(DivergenceError, match="the loss is NaN or Inf at step 3 of 8"):
        finetune(config, Broken(), few)
    assert [path.name for path in tmp_path.glob("state*")] == ["state-000000002.pt"]
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "last.safetensors").values())


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
    """Graphs are captured but not compiled to code, which is seconds faster."""
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
