"""Finetuning: every augmentation learns, costs what the plan says, and a stopped run goes on to the same bits."""

from __future__ import annotations

import copy
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastnull import choices
from fastnull.augment import NullspaceAugment
from fastnull.choices import Outcome
from fastnull.compat import import_timm
from fastnull.data import digits, evaluation_data
from fastnull.distributed import Processes
from fastnull.finetune import DivergenceError, FinetuneConfig, finetune
from fastnull.finetune.checkpoint import read_state, write_state
from fastnull.finetune.config import ATTACKS, AUGMENTS, RENAMED
from fastnull.finetune.plan import make_plan
from fastnull.finetune.refresh import RefreshBatches
from fastnull.finetune.training import Training
from fastnull.models import create_model, load_model, save_checkpoint
from fastnull.record import device_name
from fastnull.synthesis.config import ALL_MODES, SynthesisConfig
from fastnull.vit import SITES
from tests.pictures import write_pictures

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
    return replace(base, augment=augment, noise=noise, **changes)


@pytest.fixture(scope="module")
def few():
    images, labels = digits()[0].tensors
    return images[:48], labels[:48]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, stop: Callable[[], None]) -> None:
    """Call `stop` at the end of a step: from inside the run, as a signal comes."""
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
    if augment == "universal":  # each epoch has a bank of its own: mild ones, or their differences are all one sees
        config = replace(config, noise={"limit": 0.25})
    result = finetune(config, copy.deepcopy(half_trained.model))
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < first["loss"]
    assert last["val_accuracy"] > 70
    assert result.best_accuracy == max(record["val_accuracy"] for record in result.history)
    assert result.model.training is False
    assert (result.seconds["synthesis"] > 0) == (augment != "none")


# Universal learns its bank at epoch starts: step 3 lies behind the second one. 2 workers and image files: below.
@pytest.mark.parametrize("augment", AUGMENTS)
def test_stopped_run_goes_on_bitwise(tmp_path, few, monkeypatch, augment):
    config = small(
        augment, drop_path=0.2, mixup=0.4, cutmix=0.5, smoothing=0.1, ema_decay=0.9, clip_grad=1.0,
        layer_decay=0.8, warmup_epochs=0.5, num_classes=10,
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
def test_stopped_run_on_image_files_goes_on_bitwise(tmp_path, monkeypatch, workers):
    """Random crops, RandAugment and erasing in worker processes; stopped by a crash behind a periodic state."""
    pictures = write_pictures(tmp_path / "pictures")
    config = small(
        "boundary", data=str(pictures), auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5, mixup=0.2,
        drop_path=0.1, batch_size=4, epochs=2, val_fraction=0.25, workers=workers, checkpoint_every=3,
    )  # fmt: skip
    whole, parts = replace(config, out=str(tmp_path / "whole")), replace(config, out=str(tmp_path / "parts"))
    finetune(replace(whole, workers=0))

    def crash():
        raise OSError("lost the machine")

    with monkeypatch.context() as patch:
        stop_after(patch, 7, crash)  # 4 steps an epoch: in the second one
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


def test_full_disk_is_told_and_the_state_before_stays(tmp_path, few, monkeypatch):
    config = replace(SMALL, num_classes=10, out=str(tmp_path / "full"))
    finetune(replace(config, out=str(tmp_path / "whole")), train_data=few)
    original = os.fsync

    def fsync(handle):
        if (tmp_path / "full" / "state-000000002.pt").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises(OSError, match=r"cannot save step 4: .*No space left.*the state of step 2 is whole"):
            finetune(config, train_data=few)
    assert not list((tmp_path / "full").glob(".*.tmp"))
    finetune(replace(config, resume=True), train_data=few)
    assert_same_run(tmp_path / "whole", tmp_path / "full")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, the system lets no file grow beyond `size` bytes: to whoever writes it is a full disk."""
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
    """By the system's own error: safetensors has another one of its own."""
    model = create_model("vit_digits", num_classes=10)
    model = model if made else nn.Sequential(model)
    config = replace(SMALL, num_classes=10, out=str(tmp_path))
    with ExitStack() as stack:
        stop_after(monkeypatch, 3, lambda: stack.enter_context(largest_file(size)))
        monkeypatch.setattr(Training, "end_epoch", best_of_all(Training.end_epoch))
        with pytest.raises(
            OSError, match=rf"cannot save step 4: File too large \(.*{file}\); the state of step 2 is whole"
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
            OSError, match=r"cannot log step 3: File too large \(.*jsonl\); the state of step 2 is whole"
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


def test_a_state_of_another_run_does_not_go_on(tmp_path, few):
    config = replace(SMALL, num_classes=10)
    for name, seed in (("one", 0), ("other", 1)):
        finetune(replace(config, seed=seed, epochs=2 + seed, out=str(tmp_path / name)), train_data=few)
    foreign = sorted((tmp_path / "other").glob("state-*.pt"))[-1]
    shutil.copy(foreign, tmp_path / "one")
    with pytest.raises(ValueError, match=f"{foreign.name} is of another run"):
        finetune(replace(config, epochs=2, resume=True, out=str(tmp_path / "one")), train_data=few)


def test_metrics_cut_before_the_state_are_told_and_epochs_come_back(tmp_path, few):
    config = replace(SMALL, num_classes=10, epochs=2, out=str(tmp_path))
    finetune(config, train_data=few)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:1]) + lines[1][:10])
    with pytest.warns(UserWarning, match="lacks 5 records up to step 4, those of 2 epochs come back"):
        finetune(replace(config, resume=True), train_data=few)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [json.loads(lines[row]) for row in (0, 2, 5)]


@pytest.mark.parametrize(
    "entry", ["step", "model", "optimizer", "ema", "scaler", "augment", "history", "best", "seconds"]
)
def test_a_state_that_lacks_an_entry_is_told(tmp_path, few, entry):
    config = replace(SMALL, num_classes=10, epochs=1, keep_last=1, out=str(tmp_path))
    finetune(config, train_data=few)
    (path,) = tmp_path.glob("state-*.pt")
    state = read_state(path)
    del state[entry]
    write_state(path, state)
    with pytest.raises(ValueError, match=rf"it lacks {entry}|holds no state with a {entry}"):
        finetune(replace(config, resume=True), train_data=few)


def test_torn_state_costs_the_steps_since_the_one_before(tmp_path, few):
    config = small("boundary", num_classes=10, out=str(tmp_path / "whole"))
    finetune(config, train_data=few)
    torn = replace(config, out=str(tmp_path / "torn"))
    finetune(torn, train_data=few)
    newest = sorted((tmp_path / "torn").glob("state-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="using the state before it"):
        finetune(replace(torn, resume=True), train_data=few)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


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


def test_finished_run_resumes_to_its_result(tmp_path, few):
    config = replace(SMALL, num_classes=10, out=str(tmp_path / "run"))
    first = finetune(config, train_data=few)
    again = finetune(replace(config, resume=True), train_data=few)
    assert again.best_accuracy == first.best_accuracy
    assert [record["loss"] for record in again.history] == [record["loss"] for record in first.history]
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(config, train_data=few)
    with pytest.raises(ValueError, match=r"other settings: lr \(was 0.002, now 0.1\)"):
        finetune(replace(config, lr=0.1, resume=True), train_data=few)
    finetune(replace(config, lr=0.1, overwrite=True), train_data=few)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["lr"] == 0.1


def test_a_resumed_run_keeps_the_implementations_of_its_ops(tmp_path, few, monkeypatch):
    """As if its first part had run on a GPU; the second finds that kernel right here, or says that it did not."""
    used = {"attention_out bfloat16 197 64": "cuda", "dgelu_ bfloat16 3072": "triton"}
    for name in ("_used", "_found", "_pinned"):
        monkeypatch.setattr(choices, name, dict(used) if name == "_used" else {})
    config = replace(SMALL, num_classes=10, epochs=1, out=str(tmp_path))
    finetune(config, train_data=few)
    assert json.loads((tmp_path / "config.json").read_text())["provenance"]["implementations"] == used
    (state,) = map(read_state, tmp_path.glob("state-*.pt"))
    assert state["implementations"] == used
    message = r"not bit for bit: .* because attention_out bfloat16 197 64: cuda was not checked here; dgelu_ .*: triton"
    with pytest.warns(UserWarning, match=message):
        finetune(replace(config, resume=True), train_data=few)
    here = device_name("cpu")
    for problem, name in used.items():
        choices.add(here, {problem: {"library": Outcome(ms=1.0), name: Outcome(ms=2.0)}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune(replace(config, resume=True), train_data=few)
    assert [choices.ranked(here, problem)[0] for problem in used] == ["cuda", "triton"]


def test_resume_with_another_model_is_told(tmp_path, few):
    config = replace(SMALL, num_classes=10, epochs=1, out=str(tmp_path))
    finetune(config, train_data=few)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other, message in (
        (create_model("vit_digits", num_classes=7), r"state is of another model or optimiser: .*head\.weight"),
        (create_model("vit_digits", num_classes=10, depth=2), "state is of another model or optimiser: .*blocks"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            finetune(replace(config, epochs=1, resume=True), other, train_data=few)
    with pytest.raises(ValueError, match="averaged weights are only here"):
        finetune(_without_settings(replace(config, ema_decay=0.9, resume=True)), train_data=few)
    assert before.items() - {path: path.read_bytes() for path in tmp_path.iterdir()}.items() == {
        (tmp_path / "config.json", before[tmp_path / "config.json"])
    }


def _without_settings(config: FinetuneConfig) -> FinetuneConfig:
    """The run without the file that would tell other settings first."""
    (Path(config.out) / "config.json").unlink()
    return config


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


def test_global_generators_are_left_alone(few):
    state = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    finetune(replace(SMALL, epochs=1, num_classes=10, mixup=0.2), train_data=few)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (numpy.random.get_state()[1] == state[1]).all()


def test_files_of_a_run(tmp_path, few):
    config = small("boundary", num_classes=10, ema_decay=0.9, out=str(tmp_path))
    result = finetune(config, train_data=few)
    assert (result.best_path, result.last_path) == (tmp_path / "best.safetensors", tmp_path / "last.safetensors")
    written = json.loads((tmp_path / "config.json").read_text())
    assert FinetuneConfig.from_dict(written["config"]) == config
    assert written["synthesis"]["eps"] == 0.1  # the default of boundary at patch, resolved
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


# The cost of an image in a step, counted by hand: a view 3 (forward 1, backward 2), the clean logits 1, a step of
# synthesis or attack 2 (forward 1, input gradient 1).
COSTS = {
    "none": 3, "random": 6, "universal": 6, "per_image": 6 + 8, "boundary": 6 + 8, "adversarial": 6 + 6,
    "trades": 6 + 1 + 6,
}  # fmt: skip

COUNTED = {"per_image": {"steps": 4}, "boundary": {"steps": 4}, "universal": {"image_fraction": 0.1}}


@pytest.mark.parametrize("augment", AUGMENTS)
def test_equal_budgets_cost_the_same(augment):
    config = FinetuneConfig(
        augment=augment, noise=COUNTED.get(augment), site="patch", attack_steps=3, compute_budget=60.0, epochs=1
    )  # fmt: skip
    plan = make_plan(config, 1000)
    assert plan.step_cost == COSTS[augment]
    dropping = make_plan(replace(config, drop_path=0.1), 1000).step_cost
    assert dropping == plan.step_cost + (augment in ("per_image", "boundary"))
    assert plan.budget == 60_000
    assert plan.total_cost <= plan.budget
    # no further step fits
    assert plan.total_cost + plan.step_cost * plan.batch_size + plan.refresh_cost > plan.budget
    assert plan.epochs == math.ceil(plan.steps / plan.steps_per_epoch)
    if augment == "universal":
        # 3 rounds of a tenth of 15 batches of 64 images, each costing clean and noisy logits and a gradient
        assert plan.refresh_cost == 3 * 1 * 64 * 3


ONE_VIEW_COSTS = {"random": 3, "universal": 3, "per_image": 3 + 9 / 4, "boundary": 3 + 9 / 4, "adversarial": 3 + 6 / 4}


@pytest.mark.parametrize("augment", ONE_VIEW_COSTS)
def test_one_view_costs_half_and_its_share_of_the_search(augment):
    config = FinetuneConfig(
        augment=augment, noise=COUNTED.get(augment), site="patch", attack_steps=3, compute_budget=60.0,
        noise_fraction=0.25,
    )  # fmt: skip
    assert make_plan(config, 1000).step_cost == ONE_VIEW_COSTS[augment]


def test_one_view_needs_noise_of_its_own():
    for augment in ("none", "trades"):
        with pytest.raises(ValueError, match="noise_fraction is for augmentations of one view"):
            FinetuneConfig(augment=augment, noise_fraction=0.5)
    with pytest.raises(ValueError, match="noise_fraction must be >= 0 and <= 1"):
        FinetuneConfig(noise_fraction=1.1)


def test_boundary_noise_in_pixels_takes_one_view_unless_two_are_asked_for():
    config = FinetuneConfig(site="pixels")
    assert (config.fraction, make_plan(config, 1000).step_cost) == (0.5, 3 + 3 / 2)
    two = replace(config, noise_fraction=0.0)
    assert (two.fraction, make_plan(two, 1000).step_cost) == (0, 6 + 2)
    assert (FinetuneConfig(site="patch").fraction, FinetuneConfig(augment="random", site="pixels").fraction) == (0, 0)


def test_budget_is_spent_as_planned(few):
    config = small("boundary", num_classes=10, compute_budget=27.0, epochs=1)
    result = finetune(config, train_data=few)
    # 43 images x 27 = 1161; a step costs 16 x (6 + 4) = 160: seven steps, the last in the fourth epoch
    assert result.plan.steps == 7
    assert result.cost == {"planned": 7 * 160, "spent": 7 * 160, "budget": 1161}
    assert [record["step"] for record in result.history] == [2, 4, 6, 7]
    with pytest.raises(ValueError, match="does not pay for one step"):
        make_plan(replace(config, compute_budget=1.0), 43)


def test_the_counted_passes_are_the_passes_made(few, monkeypatch):
    """The accounting against the model itself: forwards of the first block, in images, over one step."""
    seen = []
    two_views = ("none", "random", "boundary", "per_image", "adversarial", "trades")
    cases = [(augment, None) for augment in two_views]
    cases += [(augment, 0.5) for augment in ("random", "boundary", "per_image", "adversarial")]
    for augment, fraction in cases:
        model = create_model("vit_digits", num_classes=10)
        passed: list[int] = []
        model.network.blocks[0].register_forward_pre_hook(lambda _, args, to=passed: to.append(len(args[0])))
        config = small(augment, num_classes=10, epochs=1, val_fraction=0.0, train_fraction=1 / 3)
        config = replace(config, noise_fraction=fraction)
        config = replace(config, backend="reference")  # the other backends do not call the model's own modules
        plan = make_plan(config, 48)
        assert plan.steps == 1
        finetune(config, model, train_data=few)
        # forwards alone: of a view's 3 one, of a synthesis step's 2 one; and one image that tries the model out
        views = 1 if augment == "none" or fraction else 2
        synthesis = (plan.step_cost - 3 * views) / (fraction or 1)
        expected = views + (fraction or 1) * (synthesis % 2 + synthesis // 2)
        seen.append((augment, (sum(passed) - 1) / plan.batch_size, expected))
    assert all(made == expected for _, made, expected in seen), seen


def test_image_folder_is_finetuned_and_evaluated(tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    config = small(
        "boundary", data=str(pictures), epochs=6, batch_size=8, val_fraction=0.2, crop_scale=0.5,
        img_size=32, lr=3e-3,
    )  # fmt: skip
    result = finetune(config)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    tested = evaluation_data(str(pictures), result.model)
    images, labels = (torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*tested, strict=True))
    assert images.shape == (12, 3, 32, 32)
    accuracy = (result.model(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.5  # cat, flower and temple differ in colour


def _coloured(root: Path, names: dict[str, tuple[int, int, int]]) -> Path:
    """A folder of classes that differ in colour alone, four images each in train/ and val/."""
    for split in ("train", "val"):
        for name, colour in names.items():
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16, 16), colour).save(root / split / name / f"{number}.png")
    return root


RED, GREEN, BLUE = (220, 30, 30), (30, 220, 30), (30, 30, 220)


def test_labels_mean_the_models_classes_all_the_way(tmp_path):
    """A model of three classes, its file, folders that have two of them or name them in another order."""
    three = _coloured(tmp_path / "three", {"cat": RED, "dog": GREEN, "frog": BLUE})
    config = replace(SMALL, data=str(three), epochs=20, batch_size=12, lr=5e-3, img_size=16, val_fraction=0.0,
                     color_jitter=0.0, out=str(tmp_path / "run"))  # fmt: skip
    result = finetune(config)
    assert result.model.classes == ["cat", "dog", "frog"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["classes"] == ["cat", "dog", "frog"]
    model = load_model(tmp_path / "run" / "last.safetensors").eval()
    assert model.classes == ["cat", "dog", "frog"]

    def accuracy(data: Path, model: nn.Module = model) -> float:
        images, labels = zip(*evaluation_data(str(data), model), strict=True)
        return (model(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean().item()

    assert accuracy(three) == 1
    two = _coloured(tmp_path / "two", {"dog": GREEN, "frog": BLUE})
    assert accuracy(two) == 1
    with pytest.raises(ValueError, match="does not know: bird"):
        accuracy(_coloured(tmp_path / "bird", {"bird": RED, "dog": GREEN}))

    # going on from the file with a folder of the same classes keeps its head, whatever the order of the names
    turned = copy.deepcopy(model)
    turned.classes = ["frog", "cat", "dog"]
    for parameter in turned.network.head.parameters():
        parameter.data = parameter.data[[2, 0, 1]]
    save_checkpoint(turned, tmp_path / "turned.safetensors")
    again = finetune(replace(config, checkpoint=str(tmp_path / "turned.safetensors"), epochs=1, lr=1e-9, out=None))
    assert again.model.classes == ["frog", "cat", "dog"]
    assert again.history[0]["loss"] < 2 * result.history[-1]["loss"] + 0.01  # 2.5 and more with labels in other places
    assert accuracy(three, again.model.eval()) == 1


def test_a_head_for_other_classes_starts_fresh(tmp_path):
    model = create_model("vit_digits", num_classes=2)
    model.classes = ["cat", "dog"]
    path = tmp_path / "pets.safetensors"
    save_checkpoint(model, path)
    data = _coloured(tmp_path / "data", {"bird": RED, "frog": GREEN})
    config = replace(SMALL, data=str(data), checkpoint=str(path), img_size=16, batch_size=8, epochs=1, lr=1e-9)
    with pytest.warns(UserWarning, match=r"for other classes \(cat, dog\); .*head for bird, frog starts fresh"):
        found = finetune(config).model
    assert found.classes == ["bird", "frog"]
    assert not torch.allclose(found.network.head.weight, model.network.head.weight, atol=1e-3)
    torch.testing.assert_close(found.network.blocks[0].attn.qkv.weight, model.network.blocks[0].attn.qkv.weight)


def test_a_given_model_must_have_the_datas_classes(tmp_path):
    data = str(_coloured(tmp_path / "data", {"bird": RED, "frog": GREEN}))
    config = replace(SMALL, data=data, img_size=16, batch_size=8, epochs=1)
    with pytest.raises(ValueError, match=r"the training data has 2 classes .bird, frog., the model 10 without names"):
        finetune(config, model=create_model("vit_digits"))
    named = create_model("vit_digits", num_classes=2)
    named.classes = ["bird", "dog"]
    with pytest.raises(ValueError, match="the training data has classes that the model does not know: frog"):
        finetune(config, model=named)


class _Named(TensorDataset):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> None:
        super().__init__(images, labels)
        self.classes = classes


def test_held_out_images_are_matched_by_name(few):
    images, labels = few
    names = [str(digit) for digit in range(10)]
    plain = finetune(replace(SMALL, num_classes=10), train_data=few, val_data=few)
    turned = _Named(images, 9 - labels, names[::-1])
    train = _Named(images, labels, names)
    assert finetune(SMALL, train_data=train, val_data=turned).history[-1]["val_accuracy"] == pytest.approx(
        plain.history[-1]["val_accuracy"]
    )
    with pytest.raises(ValueError, match="val_data has classes that the model does not know: ten"):
        finetune(SMALL, train_data=train, val_data=_Named(images, labels, ["ten"]))


@pytest.mark.parametrize("how", ["folder", "data", "model"])
def test_one_class_teaches_nothing(tmp_path, few, how):
    config, arguments = SMALL, {}
    if how == "folder":
        config = replace(SMALL, data=str(_coloured(tmp_path, {"cat": RED})), img_size=16)
    elif how == "data":
        arguments = {"train_data": _Named(few[0], torch.zeros(48, dtype=torch.long), ["0"])}
    else:
        config, arguments = replace(SMALL, num_classes=1), {"train_data": (few[0], torch.zeros(48, dtype=torch.long))}
    with pytest.raises(ValueError, match="at least two classes"):
        finetune(config, **arguments)


def test_resume_with_other_classes_is_refused(tmp_path):
    data = _coloured(tmp_path / "data", {"cat": RED, "dog": GREEN})
    config = replace(SMALL, data=str(data), img_size=16, batch_size=8, epochs=1, out=str(tmp_path / "run"))
    finetune(config)
    (data / "train" / "cat").rename(data / "train" / "emu")
    with pytest.raises(ValueError, match=r"other settings: classes \(was \['cat', 'dog'\], now \['dog', 'emu'\]\)"):
        finetune(replace(config, resume=True, epochs=1))


def test_grey_models_learn_from_augmented_files(tmp_path):
    data = _coloured(tmp_path / "data", {"cat": RED, "dog": GREEN})
    config = replace(SMALL, data=str(data), batch_size=8, epochs=1, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
    model = create_model("vit_digits", num_classes=2, channels=1)
    assert math.isfinite(finetune(config, model=model).history[-1]["loss"])
    with pytest.raises(ValueError, match="takes images of 4 channels; image files give 1"):
        finetune(config, model=create_model("vit_digits", num_classes=2, channels=4))


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


@pytest.mark.parametrize("augment", ["boundary", "adversarial"])
def test_channels_last_changes_rounding_alone(few, augment):
    config = small(augment, num_classes=10)
    plain, last = (finetune(replace(config, channels_last=on), train_data=few) for on in (False, True))
    weight = last.model.network.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert [r["loss"] for r in last.history] == pytest.approx([r["loss"] for r in plain.history], rel=1e-3)


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


def test_nan_loss_names_its_step_and_saves_nothing_after_it(tmp_path, few):
    config = replace(SMALL, num_classes=10, log_every=100, out=str(tmp_path), epochs=4)
    with pytest.raises(DivergenceError, match="the loss is NaN or Inf at step 3 of 8"):
        finetune(config, Broken(), few)
    assert [path.name for path in tmp_path.glob("state*")] == ["state-000000002.pt"]
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "last.safetensors").values())


BAD_DATA = {
    "labels out of range": (lambda x, y: (x, y + 5), ValueError, r"labels must lie in 0\.\.9"),
    "normalised images": (lambda x, y: (2 * x - 1, y), ValueError, r"images must be pixels in \[0, 1\]"),
    "NaN": (lambda x, y: (torch.where(x > 0.9, torch.nan, x), y), ValueError, "must be finite"),
    "integers": (lambda x, y: (x.long(), y), TypeError, "floating dtype"),
    "wrong size": (lambda x, y: (x[..., :12], y), ValueError, r"does not take the training images \[3, 16, 12\]"),
    "wrong channels": (lambda x, y: (x[:, :1], y), ValueError, "does not take the training images|channels"),
    "empty": (lambda x, y: (x[:0], y[:0]), ValueError, "at least one image"),
    "unequal": (lambda x, y: (x, y[:-1]), ValueError, "a label for each image"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("augment", ["none", "boundary"])
def test_bad_data(few, case, augment):
    spoil, error, message = BAD_DATA[case]
    with pytest.raises(error, match=message):
        finetune(small(augment, num_classes=10), train_data=spoil(*few))


TEN = torch.eye(10)
LABELS: dict[str, Callable[[torch.Tensor], Any]] = {
    **{str(dtype)[6:]: (lambda y, dtype=dtype: y.to(dtype)) for dtype in (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32,
    )},
    "numpy": lambda y: y.to(torch.int32).numpy(),
    "list": lambda y: y.tolist(),
    **{f"one-hot {str(dtype)[6:]}": (lambda y, dtype=dtype: TEN[y].to(dtype)) for dtype in (
        torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64,
    )},
}  # fmt: skip
"""The same labels in other forms."""


def weights_of(result) -> torch.Tensor:
    return torch.cat([value.flatten() for value in result.model.state_dict().values()])


@pytest.fixture(scope="module")
def by_index(few):
    """A run on class indices in int64, without and with mixing."""
    config = replace(SGD, num_classes=10, epochs=1)
    return {mixed: finetune(replace(config, **(MIXED if mixed else {})), None, few, few) for mixed in (False, True)}


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("form", LABELS)
def test_labels_of_every_form_train_the_same_model(few, by_index, form, mixed):
    images, labels = few
    data = (images, LABELS[form](labels))
    config = replace(SGD, num_classes=10, epochs=1, **(MIXED if mixed else {}))
    result = finetune(config, None, data, list(data))
    right = by_index[mixed]
    assert result.history[-1]["val_accuracy"] == right.history[-1]["val_accuracy"]
    assert result.history[-1]["loss"] == pytest.approx(right.history[-1]["loss"], rel=1e-6)
    torch.testing.assert_close(weights_of(result), weights_of(right), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 10])
def test_bool_labels_are_the_classes_0_and_1(few, classes):
    images, labels = few
    config = replace(SMALL, num_classes=classes, epochs=1)
    right = finetune(config, None, (images, labels % 2), few[:1] + (labels % 2,))
    result = finetune(config, None, (images, labels % 2 == 1), few[:1] + (labels % 2 == 1,))
    assert torch.equal(weights_of(result), weights_of(right))
    assert result.best_accuracy == right.best_accuracy


@pytest.mark.parametrize("held_out", [3, 8, 10, 17])
def test_accuracy_of_soft_labels_is_that_of_the_likeliest_class(held_out):
    """One-hot labels once gave 900 %, and with any other number of held-out images than classes an error."""
    images = torch.rand(100, 3, 16, 16)
    soft = TEN[torch.zeros(100, dtype=torch.long)] * 0.6 + 0.04
    config = FinetuneConfig(num_classes=10, epochs=3, batch_size=10, augment="none", lr=5e-3, progress=False)
    result = finetune(config, None, (images, soft), (images[:held_out], soft[:held_out]))
    assert result.best_accuracy == 100.0


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("changes", [{}, {**MIXED, "accumulate": 2}], ids=["plain", "mixed in parts"])
@pytest.mark.filterwarnings("ignore:the universal noise")
def test_soft_labels_train_with_every_augmentation(few, augment, changes):
    images, labels = few
    soft = TEN[labels] * 0.8 + 0.02
    result = finetune(replace(SMALL, num_classes=10, epochs=1, augment=augment, **changes), None, (images, soft))
    assert math.isfinite(result.history[-1]["loss"])
    assert 0 <= result.best_accuracy <= 100


def test_smoothing_is_that_of_soft_labels(few):
    """Smoothed in the loss, in mixing, or by hand: one target."""
    images, labels = few
    config = replace(SGD, num_classes=10, epochs=1)
    by_hand = finetune(config, None, (images, 0.8 * TEN[labels] + 0.02))
    smoothed = finetune(replace(config, smoothing=0.2), None, few)
    torch.testing.assert_close(weights_of(smoothed), weights_of(by_hand), rtol=1e-5, atol=1e-6)
    by_hand = finetune(replace(config, mixup=0.4), None, (images, 0.8 * TEN[labels] + 0.02))
    smoothed = finetune(replace(config, mixup=0.4, smoothing=0.2), None, few)
    torch.testing.assert_close(weights_of(smoothed), weights_of(by_hand), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 0.5}, {"mixup": 0.4, "cutmix": 0.5}], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_mixed_labels_are_those_of_timm(vit, images, settings, soft):
    config = FinetuneConfig(augment="none", num_classes=10, batch_size=8, smoothing=0.1, progress=False, **settings)
    training = Training(config, vit, make_plan(config, 8), 10, torch.device("cpu"), Processes())
    labels = torch.arange(8)
    for seed in range(5):
        numpy.random.seed(seed)
        right = import_timm().data.Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=10)(
            images.clone(), labels
        )
        numpy.random.seed(seed)
        found = training._mixed(images.clone(), TEN[labels] if soft else labels)
        assert torch.equal(found[0], right[0])
        torch.testing.assert_close(found[1], right[1])


BAD_LABELS = {
    "logits": (lambda x, y: (x, 9 * TEN[y] - 1), r"labels must be probabilities, .* a value of -1 and a sum of"),
    "several classes": (lambda x, y: (x, TEN[y] + TEN[y - 1]), "a value of 0 and a sum of 2"),
    "other classes": (lambda x, y: (x, TEN[y][:, :9]), "must have 10 classes; got 9"),
    "fractions": (lambda x, y: (x, y + 0.5), r"must be integers \[B\] or soft labels"),
    "complex": (lambda x, y: (x, TEN[y].to(torch.complex64)), "must be integers"),
    "three tensors": (lambda x, y: (x, y, y), "a pair of tensors, images and labels; got 3"),
    "words": (lambda x, y: (x, ["three"] * len(y)), "a pair of tensors, images and labels"),
    "a number": (lambda x, y: (x, torch.tensor(3)), "a label for each image"),
    "samples of three": (lambda x, y: [(x[0], 1, 2)] * 10, r"pairs \(image, label\)"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_told_before_the_first_step(few, monkeypatch, case):
    spoil, message = BAD_LABELS[case]
    monkeypatch.setattr(Training, "train_step", None)
    config = replace(SMALL, num_classes=10)
    with pytest.raises((TypeError, ValueError), match=message):
        finetune(config, train_data=spoil(*few))
    with pytest.raises((TypeError, ValueError), match=message):
        finetune(config, train_data=few, val_data=spoil(*few))


def test_a_list_of_samples_is_a_dataset(few):
    images, labels = few
    samples = list(zip(images, labels.tolist(), strict=True))
    config = replace(SMALL, num_classes=10, epochs=1)
    assert torch.equal(weights_of(finetune(config, None, samples)), weights_of(finetune(config, None, list(few))))


def test_data_without_an_index_is_refused(few):
    with pytest.raises(TypeError, match="a length and an index"):
        finetune(replace(SMALL, num_classes=10), train_data=torch.utils.data.DataLoader([1]))
    with pytest.raises(TypeError, match="a length and an index"):
        finetune(replace(SMALL, num_classes=10), train_data=iter([1]))
    with pytest.raises(ValueError, match="num_classes is needed"):
        finetune(SMALL, train_data=few)


BAD_SETTINGS = {
    "augment": ({"augment": "boundry"}, "augment must be one of .* Did you mean 'boundary'"),
    "site": ({"site": "logits"}, "site must be"),
    "eps": ({"noise": {"eps": 0.0}}, "noise: eps must be > 0"),
    "limit": ({"noise": {"limit": -0.1}}, "noise: limit must be >= 0"),
    "limit in tokens": ({"noise": {"limit": 3.0}}, "noise: limit must be >= 0 and <= 1"),
    "noise steps": ({"noise": {"steps": 0}}, "noise: steps must be >= 1"),
    "noise field": ({"noise": {"step": 1}}, "noise: field must be one of .* Did you mean 'steps'"),
    "noise of another mode": ({"noise": SynthesisConfig()}, r"noise.mode must be augment \('boundary'\)"),
    "noise at another site": ({"noise": {"site": "block0"}}, r"noise.site must be site \('pixels'\); got 'block0'"),
    "noise of another seed": ({"noise": {"seed": 1}}, r"noise.seed is the run's seed, 0; got 1"),
    "no noise": ({"augment": "none", "noise": {"eps": 0.1}}, "noise is for augment .*; got augment='none'"),
    "attack_steps": ({"attack_steps": 0}, "attack_steps must be >= 1"),
    "attack_eps": ({"attack_eps": 8.0}, "attack_eps must be > 0 and <= 1"),
    "epochs": ({"epochs": 0}, "epochs must be >= 1"),
    "lr": ({"lr": float("nan")}, "lr must be a number or None; got nan"),
    "min_lr": ({"min_lr": 1.0}, "min_lr must be <= lr"),
    "odd": ({"mixup": 0.1, "batch_size": 5}, "batch_size must be even"),
    "smoothing": ({"smoothing": 1.0}, "smoothing must be >= 0 and < 1"),
    "amp": ({"amp": "float8"}, "amp must be one of"),
    "preset": ({"noise": {"preset": "finetune"}}, "noise.preset is for augment='universal'"),
    "both": ({"resume": True, "overwrite": True}, "either resume or overwrite"),
    "force": ({"force": True}, "force is for resume"),
    "nowhere": ({"resume": True}, "give out"),
    "infinite": ({"compute_budget": math.inf}, "compute_budget must be > 0; got inf"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case):
    changes, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**changes)


def test_whole_numbers_are_whole():
    with pytest.raises(TypeError, match=r"epochs must be an integer; got 2\.5"):
        FinetuneConfig(epochs=2.5)


def test_settings_that_need_the_model(few):
    with pytest.raises(ValueError, match="auto_augment and reprob are for image files"):
        finetune(replace(SMALL, reprob=0.5))
    with pytest.raises(ValueError, match=r"opt must be one of .* Did you mean 'adamw'"):
        finetune(replace(SMALL, num_classes=10, opt="adamww"), train_data=few)
    with pytest.raises(ValueError, match="layer_decay goes down from block to block, and Broken has no list"):
        finetune(replace(SMALL, num_classes=10, layer_decay=0.5), Broken(), few)
    with pytest.raises(ValueError, match="no adapter splits Broken"):
        finetune(replace(SMALL, num_classes=10, augment="boundary"), Broken(), few)


def test_every_setting_is_documented_and_survives_a_file():
    assert all(entry.metadata.get("help") for entry in fields(FinetuneConfig))
    config = FinetuneConfig(lr=0.25, augment="universal")
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="Did you mean 'lr'"):
        FinetuneConfig.from_dict({"lrr": 1.0})


@pytest.mark.parametrize("augment", ALL_MODES)
def test_defaults_are_one_recipe(augment):
    """Of a run, of NullspaceAugment, and of a SynthesisConfig of that mode and site, but for what a run affords."""
    config = FinetuneConfig(augment=augment)
    assert config.site == ("pixels" if augment == "boundary" else "patch")
    model = create_model("vit_digits")
    aug = NullspaceAugment(model, augment)
    in_training = {"steps": 3} if augment == "per_image" else {}
    assert aug.config == SynthesisConfig(mode=augment, site=config.site, **in_training)
    a_tenth = {"image_fraction": 0.1} if augment == "universal" else {}
    assert config.synthesis() == replace(aug.config, **a_tenth)
    assert FinetuneConfig(augment=augment, noise={"limit": 0.5}).synthesis() == replace(config.synthesis(), limit=0.5)
    assert SynthesisConfig(mode="per_image").steps == 30
    assert (config.fraction, aug.fraction) == ((0.5, 0.5) if augment == "boundary" else (0, 0))
    for site in SITES:
        recipe = SynthesisConfig(mode=augment, site=site)
        assert recipe.limit <= 1 or (augment, site) in (("universal", "patch"), ("universal", "block0"))
        assert (recipe.smooth_limit > 0) == (augment == "boundary" and site == "pixels")


def test_the_learning_rate_is_that_of_the_model(tmp_path, few):
    assert FinetuneConfig().highest_lr == FinetuneConfig(model="vit_photos").highest_lr == 4e-3
    assert FinetuneConfig(model="vit_tiny_patch16_224").highest_lr == 5e-4
    assert FinetuneConfig(lr=0.1).highest_lr == 0.1
    config = replace(SMALL, lr=None, epochs=1, num_classes=10)
    own = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    for name, model, lr in (("named", None, 4e-3), ("made", create_model("vit_digits"), 4e-3), ("own", own, 5e-4)):
        finetune(replace(config, out=str(tmp_path / name)), model, few)
        # the record has the rate that was used
        assert json.loads((tmp_path / name / "config.json").read_text())["config"]["lr"] == lr


@pytest.mark.parametrize("name", RENAMED)
def test_old_names_show_the_new_ones(name):
    message = f"{name} is now {RENAMED[name]}"
    with pytest.raises(TypeError, match=message):
        FinetuneConfig(**{name: 1})
    with pytest.raises(TypeError, match=message):
        FinetuneConfig.from_dict({name: 1})


def test_published_recipe():
    config = FinetuneConfig.published("vit_s", data="images")
    assert (config.lr, config.min_lr, config.epochs, config.train_fraction) == (1e-5, 1e-6, 20, 0.004)
    synthesis = config.synthesis()
    assert synthesis is not None
    assert (synthesis.eps, synthesis.limit, synthesis.lr) == (0.03, 3, 0.1)
    assert (synthesis.rounds, synthesis.image_fraction) == (3, 0.1)
    assert (synthesis.objective, synthesis.weight_decay, synthesis.stop) == ("l2_squared", 0.01, "batch")
    # ImageNet: 40 steps an epoch (the published loop's off-by-one makes it 41), 800 in all
    plan = make_plan(replace(config, val_fraction=0.0), 1_281_167)
    assert (plan.batch_size, plan.steps_per_epoch, plan.steps) == (128, 40, 800)
    assert FinetuneConfig.published("madry").synthesis() is None
    with pytest.raises(ValueError, match="preset must be one of"):
        FinetuneConfig.published("vit_l")
