"""Several processes on one batch: noise, losses and weights are those of one process; a dead process ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing, nn

from fastnull.data import digits
from fastnull.distributed import PeerError, Processes, explained
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.checkpoint import read_state
from fastnull.finetune.config import AUGMENTS
from fastnull.finetune.plan import make_plan
from fastnull.models import create_model
from fastnull.synthesis.config import ALL_MODES

pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

ROOT = Path(__file__).resolve().parents[2]

# 43 images after the hold-out: 2 batches of 16 an epoch and a rest. 5 held out: unequal shards.
SMALL = FinetuneConfig(
    augment="none", epochs=2, batch_size=16, lr=2e-3, attack_steps=2, log_every=1, num_classes=10, progress=False,
    device="cpu",
)  # fmt: skip


def with_noise(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes of a configuration, with noise of few steps where their augmentation has any."""
    if changes.get("augment") not in ALL_MODES:
        return changes
    if changes["augment"] == "free":
        changes = {**changes, "site": "pixels"}
    return {**changes, "noise": {"steps": 2, "limit": 0.25, "eps": 0.02, **changes.get("noise", {})}}


MIXED = {
    "mixup": 0.4, "cutmix": 0.5, "smoothing": 0.1, "clip_grad": 1.0, "ema_decay": 0.9, "layer_decay": 0.8,
    "start_fraction": 0.3,
}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {
    **{augment: {"augment": augment} for augment in AUGMENTS},
    "boundary in pixels": {"augment": "boundary", "site": "pixels", "noise": {"limit": 8 / 255}},
    "one view, boundary": {"augment": "boundary", "noise_fraction": 0.5},
    "one view, adversarial": {"augment": "adversarial", "noise_fraction": 0.3},
    "universal without held-out images": {"augment": "universal", "val_fraction": 0.0},
    "mixed": {"augment": "boundary", **MIXED},
    "in parts": {"augment": "boundary", "accumulate": 2, **MIXED},
    "free, soft labels in parts": {"augment": "free", "soft": True, "accumulate": 2, **MIXED},
    "soft labels in parts": {"augment": "boundary", "soft": True, "accumulate": 2, **MIXED},
    "compiled, channels last": {"augment": "boundary", "compile": True, "channels_last": True},
}
ROUNDED: dict[str, dict[str, Any]] = {
    # SGD: the first steps of AdamW have the gradient's sign alone, which rounding turns
    "float16": {"augment": "boundary", "amp": "float16", "opt": "sgd", "lr": 0.05, "clip_grad": 1.0},
    "free, float16": {"augment": "free", "amp": "float16", "opt": "sgd", "lr": 0.05},
    "bfloat16 and all": {
        "augment": "boundary", "amp": "bfloat16", "opt": "sgd", "lr": 0.05, "compile": True, "channels_last": True,
        "accumulate": 2, **MIXED,
    },
}  # fmt: skip
"""In float32 under autocast."""
PLAIN = {"accumulate": 1, "compile": False, "channels_last": False}
ALONE: dict[str, dict[str, Any]] = {
    **{f"{augment} in parts": {"augment": augment, "accumulate": 4} for augment in AUGMENTS},
    "one view in parts": {"augment": "adversarial", "noise_fraction": 0.3, "accumulate": 4},
    "mixed in parts": {"augment": "boundary", "accumulate": 4, **MIXED},
}


def train(changes: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """Train in float64, except ROUNDED, so that rounding errors are small; returns the weights."""
    images, labels = digits()[0].tensors
    model = untrained("amp" not in changes)
    if changes.get("soft"):
        labels = 0.9 * torch.eye(10)[labels] + 0.01
    changes = {name: value for name, value in changes.items() if name != "soft"}
    config = replace(SMALL, **with_noise(changes), out=str(out))
    return finetune(config, model, (images[:48], labels[:48])).model.state_dict()


def untrained(double: bool, **changes: Any) -> nn.Module:
    """The model that all begin with."""
    torch.manual_seed(0)
    model = create_model("vit_digits", num_classes=10, **changes)
    with torch.no_grad():
        for block in model.network.blocks:  # random weights barely see the noise: make them louder
            block.mlp.fc1.weight.mul_(4)
    return model.double() if double else model


def assert_nearly_same_run(left: Path, right: Path) -> None:
    """Weights move alike, and losses are, up to a few roundings to 16 bits."""
    start = untrained(double=False).network.state_dict()
    one, other = (load_file(folder / "last.safetensors") for folder in (left, right))
    apart, moved = (
        torch.cat([(one[name] - values[name]).flatten() for name in one]).norm() for values in (other, start)
    )
    assert moved > 0.05
    assert apart < 0.01 * moved
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (left, right)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def simplify(patch: pytest.MonkeyPatch) -> None:
    """torch.compile captures graphs but does not generate code, which is seconds faster; and
    gradients are scaled by less, so that the scale is not halved on one process where it is kept on two."""
    patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    patch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**10))


def assert_same_run(left: Path, right: Path, *, bitwise: bool = False) -> None:
    """Weights, averaged weights, noise and metrics of two runs, up to float64's rounding."""
    close = {"rtol": 0.0, "atol": 0.0} if bitwise else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(*(load_file(folder / "last.safetensors") for folder in (left, right)), **close)
    one, other = (read_state(sorted(folder.glob("state-*.pt"))[-1]) for folder in (left, right))
    for part in one.keys() & other.keys() & {"model", "ema"}:  # whole ones, of runs that are not sharded
        torch.testing.assert_close(one[part], other[part], **close)
    banks = [(state["augment"].get("bank") or {}).get("tokens") for state in (one, other)]
    torch.testing.assert_close(*banks, **close)
    assert one["best"][0] == other["best"][0]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (left, right)]
    for mine, theirs in zip(*lines, strict=True):
        record, wanted = json.loads(mine), json.loads(theirs)
        assert record.pop("seconds", {}).keys() == wanted.pop("seconds", {}).keys()
        for name in ("changed", "kind"):
            assert record.pop(name, None) == wanted.pop(name, None)
        assert record == pytest.approx(wanted, rel=0 if bitwise else 1e-6, abs=0 if bitwise else 1e-9)


def _train_together(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    simplify(pytest.MonkeyPatch())
    distributed.init_process_group("gloo", f"file://{folder}/join", rank=rank, world_size=world)
    for name, changes in (SHARED | ROUNDED).items():
        weights = train(changes, Path(folder, name))
        save_file(
            {key: value.contiguous() for key, value in weights.items()}, Path(folder, f"{name}-{rank}.safetensors")
        )
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have trained every case."""
    folder = tmp_path_factory.mktemp("together")
    multiprocessing.spawn(_train_together, (str(folder), 2), nprocs=2)
    return folder


@pytest.mark.filterwarnings("ignore:the universal noise")
@pytest.mark.parametrize("case", SHARED | ROUNDED)
def test_two_processes_are_one(together: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simplify(monkeypatch)
    train({**(SHARED | ROUNDED)[case], **PLAIN}, tmp_path / "alone")
    same = assert_same_run if case in SHARED else assert_nearly_same_run
    same(tmp_path / "alone", together / case)
    # bit for bit, or they would drift apart
    first, second = (load_file(together / f"{case}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.filterwarnings("ignore:the universal noise")
@pytest.mark.parametrize("case", ALONE)
def test_a_batch_in_parts_is_the_batch(tmp_path: Path, case: str) -> None:
    train({**ALONE[case], "accumulate": 1}, tmp_path / "whole")
    train(ALONE[case], tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def launch(*words: str) -> subprocess.Popen[str]:
    """`torchrun --nproc_per_node 2 -m fastnull finetune ...` on the CPU."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastnull",
         "finetune", "--augment", "none", "--device", "cpu", "--no-progress", *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def started(process: subprocess.Popen[str], out: Path) -> None:
    """Wait until the run has taken a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists():
            return
        time.sleep(0.05)
    pytest.fail(f"the run did not start: {process.communicate()[0]}")


def ranks(launcher: int) -> dict[int, int]:
    """Rank → process id, of torchrun's children."""
    found = {}
    for task in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((task / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher:
                environment = (task / "environ").read_bytes().split(b"\0")
                found[next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))] = int(task.name)
        except (OSError, StopIteration):
            continue
    return found


def assert_ends_with_a_dead_process(process: subprocess.Popen[str]) -> None:
    """Kill one process of a run: the others end with a message."""
    os.kill(ranks(process.pid)[1], signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of the run has ended" in text
    assert "Signal 9" in text


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes through /proc")
def test_torchrun_a_stop_a_dead_process_and_the_end(tmp_path: Path) -> None:
    """SIGTERM stops all after the same step; the run resumes; a killed process ends the others with a message."""
    out = tmp_path / "run"
    words = ("--out", str(out), "--epochs", "300", "--log-every", "1", "--train-fraction", "0.1", "--keep-last", "9")
    with launch(*words) as process:
        started(process, out)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=120)
    assert text.count("stopped after step") == 1, text
    stopped = read_state(sorted(out.glob("state-*.pt"))[-1])["step"]
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == stopped
    assert json.loads((out / "config.json").read_text())["processes"] == 2

    (out / "metrics.jsonl").unlink()
    with launch(*words, "--resume") as process:
        started(process, out)
        assert_ends_with_a_dead_process(process)


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="batch_size must be divisible by 3 processes x accumulate 2; got 64"):
        make_plan(replace(SMALL, batch_size=64, accumulate=2), 1000, processes=3)
    with pytest.raises(ValueError, match=r"8 processes x accumulate 1 need at least one image each .*has 7"):
        make_plan(SMALL, 7, processes=8)
    with pytest.raises(ValueError, match="at least two for each of 4 processes"):
        make_plan(replace(SMALL, mixup=0.5), 7, processes=4)
    with pytest.raises(ValueError, match="accumulate must be >= 1"):
        replace(SMALL, accumulate=0)


def test_every_row_is_in_one_shard_and_pairs_stay_together() -> None:
    processes = Processes()
    processes.world = 3
    for pairs in (False, True):
        shards = []
        for processes.rank in range(3):
            shards.append(processes.rows(12, pairs=pairs))
            assert (
                [place.rows.tolist() for place in processes.places(12, 2, pairs=pairs)]
                == [  # type: ignore[union-attr]
                    shards[-1][:2],
                    shards[-1][2:],
                ]
            )
        assert sorted(row for shard in shards for row in shard) == list(range(12))
        if pairs:
            assert all(row + partner == 11 for shard in shards for row, partner in zip(shard, shard[::-1], strict=True))


def test_only_a_lost_peer_is_one() -> None:
    processes = Processes()
    processes.world = 2
    with pytest.raises(PeerError, match="process 0 of 2"), explained(processes):
        raise RuntimeError("gloo: Connection closed by peer")
    with pytest.raises(RuntimeError, match="out of memory"), explained(processes):
        raise RuntimeError("out of memory")
