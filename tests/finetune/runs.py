"""Small configurations and helpers for the tests of finetuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fastnull.finetune import FinetuneConfig
from fastnull.finetune.checkpoint import read_state
from fastnull.finetune.training import Training
from fastnull.synthesis.config import ALL_MODES

# 48 of the digits: 43 after the hold-out, 2 batches of 16 an epoch and a rest, so that the order matters
SMALL = FinetuneConfig(
    augment="none", epochs=3, batch_size=16, lr=2e-3, attack_steps=2, log_every=1, progress=False
)  # fmt: skip
MIXED = {"mixup": 0.4, "cutmix": 0.5, "smoothing": 0.1}
SGD = replace(SMALL, opt="sgd", lr=0.05)
"""The first steps of AdamW have the gradient's sign alone, which rounding turns."""


def small(augment, base=SMALL, noise=None, **changes):
    """SMALL with an augmentation, whose noise takes few steps."""
    noise = {"steps": 2, "limit": 0.25, **(noise or {})} if augment in ALL_MODES else None
    if augment == "free":
        changes = {"site": "pixels", "batch_size": 2 * base.batch_size, **changes}  # as many new images in a step
    return replace(base, augment=augment, noise=noise, **changes)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, stop: Callable[[], None]) -> None:
    """Call `stop` at the end of a step, inside the run, like a signal."""
    taken = []
    original = Training.train_step

    def train_step(self: Training, images: torch.Tensor, labels: torch.Tensor) -> None:
        original(self, images, labels)
        taken.append(1)
        if len(taken) == steps:
            stop()

    monkeypatch.setattr(Training, "train_step", train_step)


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(left: Path, right: Path) -> None:
    """Bitwise: weights, averaged weights, the optimiser's state and metrics."""
    for name in ("last.safetensors", "best.safetensors"):
        one, other = load_file(left / name), load_file(right / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    one, other = (read_state(sorted(folder.glob("state-*.pt"))[-1]) for folder in (left, right))
    for part in ("model", "ema"):
        if one[part] is not None:
            assert all(torch.equal(value, other[part][key]) for key, value in one[part].items()), part
    banks = [(state["augment"].get("bank") or {}).get("tokens") for state in (one, other)]
    assert banks[0] is banks[1] is None or torch.equal(*banks)
    moments = [state["optimizer"]["state"] for state in (one, other)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert metrics(left) == metrics(right)


def weights_of(result) -> torch.Tensor:
    return torch.cat([value.flatten() for value in result.model.state_dict().values()])


TEN = torch.eye(10)


class Broken(nn.Module):
    """Logits become NaN at the third training step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(768, 10)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        logits = self.linear(images.flatten(1))
        return logits * (float("nan") if self.calls == 3 else 1.0)


def coloured(root: Path, names: dict[str, tuple[int, int, int]]) -> Path:
    """A folder of classes that differ in colour alone, four images each in train/ and val/."""
    for split in ("train", "val"):
        for name, colour in names.items():
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16, 16), colour).save(root / split / name / f"{number}.png")
    return root


RED, GREEN, BLUE = (220, 30, 30), (30, 220, 30), (30, 30, 220)
