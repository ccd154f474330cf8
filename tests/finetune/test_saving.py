"""The files of a run: weights, settings and metrics, and a full disk at every write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastnull.compat import import_timm
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.checkpoint import read_state
from fastnull.finetune.training import Training
from fastnull.models import create_model, load_model
from tests.finetune.runs import (
    SMALL,
    metrics,
    small,
    stop_after,
)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit files to `size` bytes, which acts like a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("size", "file", "made"),
    [(100_000, "best.safetensors", True), (100_000, "best.safetensors", False), (300_000, "state-000000004.pt", True)],
    ids=["weights", "weights of another's model", "state"],
)
def test_every_writer_tells_of_a_full_disk(tmp_path, few, monkeypatch, size, file, made):
    """With the system's error, also for safetensors."""
    model = create_model("vit_digits", num_classes=10)
    model = model if made else nn.Sequential(model)
    config = replace(SMALL, num_classes=10, out=str(tmp_path))
    with ExitStack() as stack:
        stop_after(monkeypatch, 3, lambda: stack.enter_context(largest_file(size)))
        monkeypatch.setattr(Training, "end_epoch", best_of_all(Training.end_epoch))
        with pytest.raises(
            OSError, match=rf"cannot save step 4: File too large \(.*{file}\); the state of step 2 is complete"
        ):
            finetune(config, model, few)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    assert finetune(replace(config, resume=True), model, few).history[-1]["step"] == 6


def best_of_all(end_epoch):
    """Every epoch is better than those before it."""

    def end(self: Training, accuracy: float | None) -> dict:
        self.best_accuracy = None
        return end_epoch(self, accuracy)

    return end


def test_metrics_and_settings_tell_of_a_full_disk(tmp_path, few, monkeypatch):
    config = replace(SMALL, num_classes=10, out=str(tmp_path))
    with largest_file(100), pytest.raises(OSError, match=r"File too large: '.*config.json'"):
        finetune(config, train_data=few)
    with ExitStack() as stack:
        stop_after(
            monkeypatch, 3, lambda: stack.enter_context(largest_file((tmp_path / "metrics.jsonl").stat().st_size))
        )
        with pytest.raises(
            OSError, match=r"cannot log step 3: File too large \(.*jsonl\); the state of step 2 is complete"
        ):
            finetune(config, train_data=few)
    monkeypatch.undo()
    finetune(replace(config, resume=True), train_data=few)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def tied(model: nn.Module) -> None:
    """Two names for one parameter."""
    blocks = model.network.blocks
    blocks[1].attn.proj.weight = blocks[0].attn.proj.weight


def in_one_storage(model: nn.Module) -> None:
    """Parameters that are views of one long tensor, as flattened ones are."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


def transposed(model: nn.Module) -> None:
    """Not contiguous."""
    for block in model.network.blocks:
        block.attn.proj.weight.data = block.attn.proj.weight.data.t().contiguous().t()


@pytest.mark.parametrize("made", [True, False], ids=["create_model's", "another's"])
@pytest.mark.parametrize("lay", [tied, in_one_storage, transposed])
def test_weights_are_saved_however_they_lie_in_memory(tmp_path, few, lay, made):
    model = create_model("vit_digits", num_classes=10)
    lay(model)
    result = finetune(
        replace(SMALL, num_classes=10, epochs=1, out=str(tmp_path)), model if made else nn.Sequential(model), few
    )
    written = load_file(result.last_path)
    assert len(written) == len(model.network.state_dict())
    for name, value in model.network.state_dict().items():
        assert torch.equal(written[name if made else f"0.network.{name}"], value), name
    if made:
        images = few[0][:4]
        assert torch.equal(load_model(result.last_path).eval()(images), model.eval()(images))


def test_files_of_a_run(tmp_path, few):
    config = small("boundary", num_classes=10, ema_decay=0.9, out=str(tmp_path))
    result = finetune(config, train_data=few)
    assert (result.best_path, result.last_path) == (tmp_path / "best.safetensors", tmp_path / "last.safetensors")
    written = json.loads((tmp_path / "config.json").read_text())
    assert FinetuneConfig.from_dict(written["config"]) == config
    assert written["synthesis"]["eps"] == 0.1  # the default of boundary at patch, resolved
    assert written["encoder"]["dtype"] == "torch.float32"
    assert written["plan"]["steps"] == 6
    assert written["data"] == {"train": 43, "validation": 5}
    assert written["provenance"]["torch"] == torch.__version__
    steps = [line for line in metrics(tmp_path) if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() >= {"loss", "lr", "influence", "norm", "epoch"} for line in steps)
    assert steps[-1]["lr"] < steps[0]["lr"]
    # the weights are those of the result, and the averaged ones
    weights = load_file(result.last_path)
    state = read_state(tmp_path / "state-000000006.pt")
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(weights[key], result.model.network.state_dict()[key])
    assert torch.equal(weights[key], state["ema"][f"network.{key}"])
    assert not torch.equal(weights[key], state["model"][f"network.{key}"])


def test_weights_load_with_timms_own_loader(tmp_path, few):
    """A plain safetensors file with timm's names, also of a model that the run did not make."""
    timm = import_timm()
    sizes = {"img_size": 16, "depth": 1, "num_classes": 10}
    model = create_model("vit_tiny_patch16_224", patch_size=4, **sizes)
    result = finetune(replace(SMALL, epochs=1, num_classes=10, out=str(tmp_path)), model, train_data=few)
    loaded = timm.create_model("vit_tiny_patch16_224", patch_size=4, **sizes, checkpoint_path=str(result.last_path))
    expected = result.model.network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_best_weights_are_those_of_the_best_epoch(tmp_path, few, monkeypatch):
    accuracies = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr("fastnull.finetune.loop.validate", lambda *_: next(accuracies))
    result = finetune(replace(SMALL, num_classes=10, out=str(tmp_path / "all"), keep_last=9), train_data=few)
    assert (result.best_epoch, result.best_accuracy) == (2, 30.0)
    second = read_state(tmp_path / "all" / "state-000000004.pt")["model"]
    best = load_file(result.best_path)
    assert all(torch.equal(best[key], second[f"network.{key}"]) for key in best)


def test_without_held_out_images_there_is_no_best_epoch(tmp_path, few):
    result = finetune(replace(SMALL, num_classes=10, val_fraction=0.0, out=str(tmp_path)), train_data=few)
    assert (result.best_epoch, result.best_accuracy, result.best_path) == (None, None, None)
    assert result.last_path is not None
