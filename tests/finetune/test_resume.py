"""A stopped, crashed or killed run resumes bitwise; what a resumed run refuses or changes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from fastnull import choices
from fastnull.choices import Outcome
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.checkpoint import read_state, write_state
from fastnull.finetune.config import AUGMENTS
from fastnull.finetune.plan import make_plan
from fastnull.models import create_model
from fastnull.record import device_name
from tests.finetune.runs import (
    GREEN,
    RED,
    SMALL,
    assert_same_run,
    coloured,
    metrics,
    small,
    stop_after,
)
from tests.pictures import write_pictures


# Universal learns its bank at epoch starts: step 3 lies behind the second one. 2 workers and image files: below.
@pytest.mark.parametrize("augment", AUGMENTS)
def test_stopped_run_goes_on_bitwise(tmp_path, few, monkeypatch, augment):
    config = small(
        augment, drop_path=0.2, mixup=0.4, cutmix=0.5, smoothing=0.1, ema_decay=0.9, clip_grad=1.0,
        layer_decay=0.8, warmup_epochs=0.5, num_classes=10, start_fraction=0.3,
    )  # fmt: skip
    whole, parts = replace(config, out=str(tmp_path / "whole")), replace(config, out=str(tmp_path / "parts"))
    finetune(whole, train_data=few)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6"):
            finetune(parts, train_data=few)
    assert [line["kind"] for line in metrics(tmp_path / "parts")].count("step") == 3
    # what else is drawn between the parts does not matter
    torch.manual_seed(99)
    numpy.random.seed(99)
    result = finetune(replace(parts, resume=True), train_data=few)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [record["epoch"] for record in result.history] == [1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "settings", [{"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5}, {"cache": "ram"}], ids=str
)
def test_stopped_run_on_image_files_goes_on_bitwise(tmp_path, monkeypatch, workers, settings):
    """Random views from files and from memory, in worker processes; stopped by a crash behind a periodic state."""
    pictures = write_pictures(tmp_path / "pictures")
    config = small(
        "boundary", data=str(pictures), **settings, mixup=0.2, drop_path=0.1, batch_size=4, epochs=2, val_fraction=0.25,
        workers=workers, checkpoint_every=3,
    )  # fmt: skip
    whole, parts = replace(config, out=str(tmp_path / "whole")), replace(config, out=str(tmp_path / "parts"))
    finetune(replace(whole, workers=0))

    def crash():
        raise OSError("lost the machine")

    with monkeypatch.context() as patch:
        stop_after(patch, 7, crash)  # 4 steps per epoch: in the second one
        with pytest.raises(OSError, match="lost the machine"):
            finetune(parts)
    assert [path.name for path in sorted((tmp_path / "parts").glob("state*"))] == [
        "state-000000004.pt",
        "state-000000006.pt",
    ]
    finetune(replace(parts, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the parts are forked")
@pytest.mark.filterwarnings("ignore:This process")
def test_killed_at_twenty_moments_goes_on_bitwise(tmp_path, few):
    """SIGKILL from outside at random times, and at every third time in the middle of writing a state."""
    config = small(
        "boundary", num_classes=10, epochs=12, checkpoint_every=1, ema_decay=0.9, mixup=0.2,
        drop_path=0.2,
    )  # fmt: skip
    whole, parts = replace(config, out=str(tmp_path / "whole")), replace(config, out=str(tmp_path / "parts"))
    finetune(whole, train_data=few)
    moments = random.Random(0)
    reached = []
    for kill in range(20):
        in_a_save = kill % 3 == 0

        def part(in_a_save=in_a_save):
            torch.set_num_threads(1)
            if in_a_save:
                # a file that is whole but not renamed yet, of one of the next saves: weights or a state, by chance.
                # So the run gets on, however slow the machine
                left = moments.randrange(1, 12)
                original = os.replace

                def replaced(*paths):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    original(*paths)

                os.replace = replaced
            finetune(replace(parts, resume=True), train_data=few)

        process = multiprocessing.get_context("fork").Process(target=part)
        process.start()
        process.join(30 if in_a_save else moments.uniform(0.05, 0.4))
        process.kill()
        process.join()
        states = sorted((tmp_path / "parts").glob("state-*.pt"))
        reached.append(read_state(states[-1])["step"] if states else 0)
        moments.random()
    assert reached == sorted(reached)
    assert any(0 < step < 24 for step in reached)  # not all before the first or after the last
    finetune(replace(parts, resume=True), train_data=few)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts").glob(".*"))  # halves of files


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_run_in_use_is_left_alone(tmp_path, few, monkeypatch, how):
    pytest.importorskip("fcntl")
    config = replace(SMALL, num_classes=10, out=str(tmp_path / "run"))
    refused = []

    def second() -> None:
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"):
            finetune(replace(config, **{how: True}), train_data=few)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
        refused.append(1)

    stop_after(monkeypatch, 3, second)
    finetune(config, train_data=few)
    assert refused
    monkeypatch.undo()
    finetune(replace(config, out=str(tmp_path / "whole")), train_data=few)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    finetune(replace(config, **{how: True}), train_data=few)  # nobody holds it any more


def test_truncated_metrics_give_a_warning_and_epochs_are_restored(tmp_path, few):
    config = replace(SMALL, num_classes=10, epochs=2, out=str(tmp_path))
    finetune(config, train_data=few)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:1]) + lines[1][:10])
    with pytest.warns(UserWarning, match="lacks 5 records up to step 4; those of 2 epochs are restored"):
        finetune(replace(config, resume=True), train_data=few)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [json.loads(lines[row]) for row in (0, 2, 5)]


@pytest.mark.parametrize(
    "entry", ["step", "model", "optimizer", "ema", "scaler", "augment", "history", "best", "seconds"]
)
def test_a_state_that_lacks_an_entry_is_refused(tmp_path, few, entry):
    config = replace(SMALL, num_classes=10, epochs=1, keep_last=1, out=str(tmp_path))
    finetune(config, train_data=few)
    (path,) = tmp_path.glob("state-*.pt")
    state = read_state(path)
    del state[entry]
    write_state(path, state)
    with pytest.raises(ValueError, match=rf"it lacks {entry}|has no {entry}"):
        finetune(replace(config, resume=True), train_data=few)


def test_finished_run_resumes_to_its_result(tmp_path, few):
    config = replace(SMALL, num_classes=10, out=str(tmp_path / "run"))
    first = finetune(config, train_data=few)
    again = finetune(replace(config, resume=True), train_data=few)
    assert again.best_accuracy == first.best_accuracy
    assert [record["loss"] for record in again.history] == [record["loss"] for record in first.history]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [(Outcome(ms=9.0), ""), (Outcome(problem="wrong: error 1"), "wrong: error 1"), (None, "was not checked here")],
)
def test_implementations_of_ops_are_kept_or_a_warning_names_them(tmp_path, few, monkeypatch, outcome, reason):
    """A run of a GPU's kernels, resumed where the results of the self-test are others. The CPU stands for the GPU."""
    problem, gpu = "attention_out bfloat16 17 16", device_name(torch.device("cpu"))
    for name in ("_found", "_pinned", "_used"):
        monkeypatch.setattr(choices, name, {})
    config = replace(SMALL, num_classes=10, epochs=2, out=str(tmp_path))
    with monkeypatch.context() as patch:
        stop_after(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        choices.use(problem, "triton")
        with pytest.raises(KeyboardInterrupt):
            finetune(config, train_data=few)
    choices.add(gpu, {problem: {"library": Outcome(ms=1.0), **({"triton": outcome} if outcome else {})}})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        finetune(replace(config, resume=True), train_data=few)
    said = [str(each.message) for each in seen if "not bit for bit" in str(each.message)]
    assert [line.split("because ")[1] for line in said] == ([f"{problem}: triton {reason}"] if reason else [])
    assert choices.ranked(gpu, problem) == (["library"] if reason else ["triton", "library"])


def test_resume_with_another_model_is_refused(tmp_path, few):
    config = replace(SMALL, num_classes=10, epochs=1, out=str(tmp_path))
    finetune(config, train_data=few)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other, message in (
        (create_model("vit_digits", num_classes=7), r"state is of another model or optimiser: .*head\.weight"),
        (create_model("vit_digits", num_classes=10, depth=2), "state is of another model or optimiser: .*blocks"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            finetune(replace(config, epochs=1, resume=True), other, train_data=few)
    (tmp_path / "config.json").unlink()  # or it would refuse the setting first
    with pytest.raises(ValueError, match="has averaged weights"):
        finetune(replace(config, ema_decay=0.9, resume=True), train_data=few)
    assert before.items() - {path: path.read_bytes() for path in tmp_path.iterdir()}.items() == {
        (tmp_path / "config.json", before[tmp_path / "config.json"])
    }


@pytest.mark.filterwarnings("ignore:the universal noise")
@pytest.mark.parametrize(
    "changes",
    [{"noise": {"limit": 0.1}}, {"augment": "universal"}, {"layer_decay": 0.5, "amp": "bfloat16"}, {"batch_size": 8}],
)
def test_forced_settings_hold_from_the_resumed_step(tmp_path, few, monkeypatch, changes):
    config = small("boundary", num_classes=10, ema_decay=0.9, layer_decay=0.8, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6"):
            finetune(config, train_data=few)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    changed = {"augment": "boundary", **changes}
    other = small(
        changed.pop("augment"),
        config,
        changed.pop("noise", None),
        resume=True,
        lr=1e-4,
        weight_decay=0.01,
        epochs=4,
        **changed,
    )
    with pytest.raises(ValueError, match=r"cannot resume .*lr \(was 0.002, now 0.0001\).*force=True"):
        finetune(other, train_data=few)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}, "nothing is lost"
    finetune(replace(other, force=True), train_data=few)
    lines = metrics(tmp_path / "run")
    (noted,) = [line for line in lines if line["kind"] == "settings"]
    assert noted["step"] == 3
    names = {"noise": ["noise.limit"], "augment": ["augment", "noise.mode", "noise.eps", "noise.image_fraction"]}
    expected = [name for change in changes for name in names.get(change, [change])]
    assert noted["changed"].keys() == {"lr", "weight_decay", "epochs", *expected}
    assert FinetuneConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())["config"]).lr == 1e-4
    # cosine over the new run's steps, from the first one on
    total = make_plan(other, 43).steps
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, total + 1))
    for line in steps[3:]:
        expected = 1e-4 * (1 + math.cos(math.pi * line["step"] / total)) / 2
        assert line["lr"] == pytest.approx(expected, abs=1e-9)
    state = read_state(sorted((tmp_path / "run").glob("state-*.pt"))[-1])
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.0, 0.01}
    scales = {group["lr_scale"] for group in state["optimizer"]["param_groups"]}
    assert min(scales) == pytest.approx(other.layer_decay**5)
    assert state["augment"]["config"]["limit"] == other.synthesis().limit
    assert (state["augment"]["bank"] is not None) == (other.augment == "universal")


def test_resume_with_other_classes_is_refused(tmp_path):
    data = coloured(tmp_path / "data", {"cat": RED, "dog": GREEN})
    config = replace(SMALL, data=str(data), img_size=16, batch_size=8, epochs=1, out=str(tmp_path / "run"))
    finetune(config)
    (data / "train" / "cat").rename(data / "train" / "emu")
    with pytest.raises(ValueError, match=r"other settings: classes \(was \['cat', 'dog'\], now \['dog', 'emu'\]\)"):
        finetune(replace(config, resume=True, epochs=1))


def test_sigterm_saves_and_exits_as_terminated(tmp_path, few, monkeypatch, capsys):
    config = replace(SMALL, num_classes=10, out=str(tmp_path / "run"))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            finetune(config, train_data=few)
    assert stopped.value.code == 143
    assert "resume with resume=True" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert finetune(replace(config, resume=True), train_data=few).history[-1]["step"] == 6


def test_ctrl_c_in_a_terminal(tmp_path):
    """Sent to the whole process group with its workers, as by a terminal: the run stops and can be resumed."""
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
    assert "resume with resume=True" in error
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
