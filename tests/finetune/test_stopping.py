"""Ctrl-C and SIGTERM: the run stops between two steps and saves its state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastnull.finetune import finetune
from fastnull.finetune.checkpoint import read_state
from tests.finetune.runs import (
    SMALL,
    metrics,
    stop_after,
)
from tests.pictures import write_pictures


def test_sigterm_saves_and_exits_as_terminated(tmp_path, few, monkeypatch, capsys):
    config = replace(SMALL, num_classes=10, out=str(tmp_path / "run"))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            finetune(config, train_data=few)
    assert stopped.value.code == 143
    assert "go on with resume=True" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert finetune(replace(config, resume=True), train_data=few).history[-1]["step"] == 6


def test_ctrl_c_in_a_terminal(tmp_path):
    """To the whole process group, workers included, as a terminal sends it: the run stops in order and goes on."""
    pictures = write_pictures(tmp_path / "pictures")
    script = (
        "import sys; from fastnull.finetune import *;"
        f"finetune(FinetuneConfig(data={str(pictures)!r}, augment='none', epochs=10**6, batch_size=4, workers=2,"
        f"img_size=32, out={str(tmp_path / 'run')!r}, log_every=1, progress=False))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        metrics_file = tmp_path / "run" / "metrics.jsonl"
        for _ in range(600):
            if metrics_file.exists() and metrics_file.read_text().count('"kind": "step"') >= 3:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "go on with resume=True" in error
    state = read_state(sorted((tmp_path / "run").glob("state-*.pt"))[-1])
    assert state["step"] == metrics(tmp_path / "run")[-1]["step"]  # nothing was lost


def test_second_ctrl_c_ends_at_once(few, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_after(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        finetune(replace(SMALL, num_classes=10), train_data=few)
    assert str(stopped.value) == ""  # not the orderly end
