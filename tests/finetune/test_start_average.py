"""Weights between those of the start and the trained ones."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastnull.experiments.settings import CompareSettings
from fastnull.finetune import finetune
from fastnull.finetune.dry_run import dry_run
from fastnull.models import create_model, load_model, save_checkpoint
from fastnull.rng import generator
from tests.finetune.runs import small


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_result_lies_between_start_and_end(tmp_path, few, ema_decay):
    """The training itself is the same, held-out images are judged on the average, and so is the best epoch."""
    start = create_model("vit_digits", num_classes=10)
    config = small("boundary", num_classes=10, ema_decay=ema_decay, val_fraction=0.2, lr=1e-2)
    found = {}
    for fraction in (0.0, 0.25):
        out = str(tmp_path / str(fraction))
        found[fraction] = finetune(replace(config, start_fraction=fraction, out=out), copy.deepcopy(start), few)
    plain, average = found[0.0], found[0.25]
    moved = 0.0
    for (name, first), end, mean in zip(
        start.state_dict().items(), plain.model.state_dict().values(), average.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mean, 0.75 * end + 0.25 * first, msg=name)
        moved = max(moved, float((mean - end).abs().max()))
    assert moved > 1e-3
    assert [record["loss"] for record in average.history] == [record["loss"] for record in plain.history]
    saved = load_model(average.last_path)
    images = torch.rand(4, 3, 16, 16, generator=generator(1))
    with torch.no_grad():
        torch.testing.assert_close(saved.eval()(images), average.model(images))
    assert json.loads((tmp_path / "0.25" / "config.json").read_text())["config"]["start_fraction"] == 0.25


def test_another_start_is_refused_at_resume(tmp_path, few):
    config = small("none", num_classes=10, start_fraction=0.5, out=str(tmp_path))
    start = create_model("vit_digits", num_classes=10)
    finetune(config, copy.deepcopy(start), few)
    before = (tmp_path / "last.safetensors").read_bytes()
    finetune(replace(config, resume=True), copy.deepcopy(start), few)
    with torch.no_grad():
        next(start.network.head.parameters()).add_(0.01)
    with pytest.raises(ValueError, match="start_fraction needs the weights that the run began with"):
        finetune(replace(config, resume=True), start, few)
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_a_new_head_is_refused(tmp_path, few):
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(create_model("vit_digits", num_classes=7), weights)
    config = small("none", num_classes=10, checkpoint=str(weights), start_fraction=0.5, out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="start_fraction mixes in the weights at the start, but their head is new"):
        finetune(config, train_data=few)
    settings = CompareSettings(common={"start_fraction": 0.5}, methods=("none",))
    with pytest.raises(ValueError, match="their head is new: train it first"):
        dry_run(replace(config, data="digits"))
    start = settings.start("new head", 0)
    assert start is not None
    assert start.start_fraction == 0, "the training of the head itself"
    assert settings.configuration("none").start_fraction == 0.5


def test_a_head_that_was_trained_is_no_longer_new(tmp_path, few):
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(create_model("vit_digits", num_classes=7), weights)
    model = create_model("vit_digits", num_classes=10, checkpoint=weights)
    model.network.pos_embed.requires_grad_(False)
    config = small("none", num_classes=10)
    smooth = finetune(replace(config, ema_decay=0.9), copy.deepcopy(model), few).model
    assert not smooth.new_head
    first = finetune(config, model, few).model
    average = finetune(replace(config, start_fraction=0.5), first, few).model
    trainable = {name: parameter.requires_grad for name, parameter in average.named_parameters()}
    assert trainable == {name: parameter.requires_grad for name, parameter in first.named_parameters()}
    before = average.network.head.weight.detach().clone()
    finetune(config, average, few)
    assert not torch.equal(average.network.head.weight, before), "the result can be trained further"


class Quantised(nn.Module):
    """A frozen scale of integers, and buffers that the first forward passes make and enlarge."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1, dtype=torch.int8), requires_grad=False)
        self.linear = nn.Linear(768, 10)
        self.register_buffer("calls", torch.zeros(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls = torch.cat([self.calls, self.calls.new_ones(1)])
            self.register_buffer("seen", images.mean())
        return self.linear((images * self.scale).flatten(1))


def test_integers_and_buffers_are_those_of_the_trained_model(few):
    model = Quantised()
    start = copy.deepcopy(model.linear.weight)
    average = finetune(small("none", start_fraction=0.25), model, few).model
    assert torch.equal(average.scale, model.scale)
    assert torch.equal(average.seen, model.seen)
    assert torch.equal(average.calls, model.calls)
    torch.testing.assert_close(average.linear.weight, 0.75 * model.linear.weight + 0.25 * start)


def test_another_fraction_is_another_run(tmp_path, few):
    config = small("none", num_classes=10, start_fraction=0.5, out=str(tmp_path))
    finetune(config, create_model("vit_digits", num_classes=10), few)
    with pytest.raises(ValueError, match=r"another value of start_fraction \(was 0\.5, now 0\.25\)"):
        finetune(replace(config, start_fraction=0.25, resume=True, force=True), train_data=few)
