"""Logs beside metrics.jsonl: what each library is given, and what a missing one says. The libraries are stand-ins."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from fastnull.finetune import finetune
from fastnull.finetune.logs import LOGS
from tests.finetune.runs import SMALL

CONFIG = replace(SMALL, epochs=1, num_classes=10)
Data = tuple[Tensor, Tensor]
Sent = list[tuple[int, str, float]]


def stand_in(sent: Sent, ended: list[str]) -> Any:
    """All four libraries in one, with the signatures that they document."""

    def log(numbers: dict[str, float], step: int) -> None:
        sent.extend((step, name, value) for name, value in numbers.items())

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None: ...

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            log({tag: scalar_value}, global_step)

        def close(self) -> None:
            ended.append("close")

    return SimpleNamespace(
        SummaryWriter=SummaryWriter,
        init=lambda project, name, config: SimpleNamespace(log=log, finish=lambda: ended.append("finish")),
        set_experiment=lambda name: None,
        start_run=lambda run_name: None,
        log_params=lambda params: None,
        log_metrics=lambda metrics, step: log(metrics, step),
        end_run=lambda: ended.append("end_run"),
    )


@pytest.mark.parametrize("kind", LOGS)
def test_every_record_is_sent(kind: str, few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Sent = []
    ended: list[str] = []
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    monkeypatch.setitem(sys.modules, module, stand_in(sent, ended))
    finetune(replace(CONFIG, log=kind, out=str(tmp_path)), train_data=few)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {(line["step"], f"{line['kind']}/loss", line["loss"]) for line in lines}
    assert expected == {entry for entry in sent if entry[1].endswith("/loss")}
    assert any(name == "epoch/val_accuracy" for _, name, _ in sent)
    assert len(ended) == 1


def test_a_missing_library_is_named(few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"log='wandb' needs wandb \(pip install wandb\)"):
        finetune(replace(CONFIG, log="wandb", out=str(tmp_path)), train_data=few)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_bad_log() -> None:
    with pytest.raises(ValueError, match="Did you mean 'wandb'"):
        replace(CONFIG, log="wandbb", out="x")
    with pytest.raises(ValueError, match="log needs a folder too"):
        replace(CONFIG, log="wandb")
