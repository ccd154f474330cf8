"""evaluate() where memory runs out, files are not what they should be, and arguments are of another type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastnull.record import remove_left_over, replacing
from fastnull.robustness import evaluate
from fastnull.vit import NormalizedModel
from tests.robustness.small_model import make_model
from tests.robustness.test_evaluate import QUICK, Counting, make_data
from tests.test_paths import OBSTACLES

CPU_MESSAGES = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
)


class Failing(nn.Module):
    """Raises an error once, after some calls."""

    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__()
        self.inner = make_model(dtype=torch.float64)
        self.error, self.left = error, after

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.inner(images)


# --- memory


@pytest.mark.parametrize(
    "error",
    [*(RuntimeError(text) for text in CPU_MESSAGES), torch.OutOfMemoryError("CUDA out of memory."), MemoryError()],
    ids=["Linux", "Windows", "CUDA", "Python"],
)
def test_finished_batches_stay_when_memory_runs_out(error: Exception, tmp_path: Path) -> None:
    data, out = make_data(), tmp_path / "result.json"
    expected = evaluate(Counting(), data, batch_size=8, **QUICK)
    # clean takes 7 calls, FGSM 2 per batch: this is its fourth
    message = r"^fgsm/1/255: cpu has no memory left; smaller batches .*resuming"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        evaluate(Failing(error, 7 + 2 * 3), data, batch_size=8, out=out, **QUICK)
    kept = json.loads(out.read_text())
    assert kept["results"] == {name: expected["results"][name] for name in ("clean", "clean_top5")}
    assert (kept["partial"]["measurement"], kept["partial"]["position"]) == ("fgsm/1/255", 24)
    rest = Counting()
    record = evaluate(rest, data, batch_size=2, out=out, **QUICK)
    assert record["results"] == expected["results"]
    assert "partial" not in record


def test_an_allocation_that_truly_fails() -> None:
    class Greedy(Failing):
        def forward(self, images: Tensor) -> Tensor:
            return torch.empty(1 << 60) if len(images) > 1 else self.inner(images)

    with pytest.raises(torch.OutOfMemoryError, match="clean: cpu has no memory left"):
        evaluate(Greedy(ValueError(), 9), make_data(), suites=("clean",), progress=False)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom")], ids=repr)
def test_other_errors_and_interrupts_keep_batches_and_stay_themselves(error: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    with pytest.raises(type(error), match=r"^boom$"):
        evaluate(Failing(error, 3), make_data(), batch_size=8, out=out, **QUICK)
    assert json.loads(out.read_text())["partial"]["position"] == 24


def test_bad_input_leaves_no_file(tmp_path: Path) -> None:
    images, labels = make_data()
    labels[-1] = 99
    with pytest.raises(ValueError, match="labels must lie in"):
        evaluate(Counting(), (images, labels), batch_size=8, out=tmp_path / "other.json", **QUICK)
    assert not (tmp_path / "other.json").exists()


# --- files


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '"text"', "[" * 100_000, '{"protocol": {}}', '{"protocol": [], "results": {}}',
        '{"protocol": {}, "results": 3}',
        '{"protocol": {}, "results": {}, "summary": {}, "images": 3}',
        '{"protocol": {}, "results": {"clean": "all"}, "summary": {}}',
        '{"protocol": {}, "results": {"fgsm": 3}, "summary": {}}',
        '{"protocol": {}, "results": {}, "summary": {}, "partial": {"measurement": "clean"}}',
        '{"protocol": {}, "results": {}, "summary": {}, "partial": 7}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_result_is_refused_by_name(text: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    out.write_text(text)
    with pytest.raises(ValueError, match=r"result\.json is not a result of evaluate\(\).*set resume=False"):
        evaluate(make_model(dtype=torch.float64), make_data(), out=out, **QUICK)
    assert out.read_text() == text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_is_not_a_regular_file_is_neither_read_nor_replaced(
    kind: str, resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    place = Path("result.json")
    OBSTACLES[kind](place)
    before = os.lstat(place)[:7]  # without times: following a link changes its time of access
    with pytest.raises(ValueError, match=r"result\.json"):
        evaluate(make_model(dtype=torch.float64), make_data(), out=place, resume=resume, **QUICK)
    assert os.lstat(place)[:7] == before


def left_by(path: Path, process: int) -> Path:
    """A temporary file as `replacing` names it in a process with this number."""
    with replacing(path) as beside:
        left = beside.with_name(beside.name.replace(f"-{os.getpid()}-", f"-{process}-"))
    path.unlink()
    assert left != beside
    left.write_text("half")
    return left


@pytest.mark.skipif(os.name != "posix", reason="asks for processes as POSIX does")
def test_temporary_files_of_killed_processes_go_and_all_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    gone, lives = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    try:
        gone.kill()
        gone.wait()
        left = left_by(out, gone.pid)
        machine = left.name.split(".")[3].split("-")[0]
        kept = [
            left_by(out, lives.pid),
            left_by(tmp_path / "other.json", gone.pid),
            left.with_name(left.name.replace(machine, "zzzzzz")),  # of another machine
            tmp_path / ".result.json.backup.tmp",
        ]
        (tmp_path / (left.name + ".tmp")).mkdir()
        for path in kept[2:]:
            path.write_text("mine")
        evaluate(make_model(dtype=torch.float64), make_data(), out=out, **QUICK)
        assert not left.exists()
        assert all(path.exists() for path in kept)
    finally:
        for process in (gone, lives):
            process.kill()
            process.communicate()


def test_own_temporary_files_stay_while_they_are_written(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.json") as beside:
        beside.write_text("{}")
        remove_left_over(tmp_path / "a.json")
        assert beside.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "10"), ("steps", 2.5), ("steps", True), ("restarts", None), ("batch_size", "8"), ("workers", 0.5),
        ("seed", "1"), ("limit", 2.5), ("limit", "4"), ("eps", "8/255"), ("eps", ("1/255",)), ("eps", 0.1),
        ("severities", (1.5,)), ("resume", "no"), ("skip_bad", 1),
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}(\[0\])? must (be|hold) "):
        evaluate(make_model(dtype=torch.float64), make_data(), **{**QUICK, name: value})


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    settings = {**QUICK, "steps": np.int64(3), "eps": np.array([1 / 255, 4 / 255]), "severities": np.array([1, 4])}
    settings["eps"], settings["severities"] = list(settings["eps"]), list(settings["severities"])
    record = evaluate(
        make_model(dtype=torch.float64), make_data(), limit=np.int32(20), seed=np.int64(0), out=tmp_path / "a.json",
        **settings,
    )  # fmt: skip
    expected = evaluate(make_model(dtype=torch.float64), make_data(), limit=20, **QUICK)
    assert record["results"] == expected["results"]
    # and a run without NumPy's numbers resumes from its file
    again = evaluate(make_model(dtype=torch.float64), make_data(), limit=20, out=tmp_path / "a.json", **QUICK)
    assert again["results"] == expected["results"]


@pytest.mark.parametrize("count", [10**6, 10**12])
def test_limits_and_batches_far_beyond_the_data(count: int) -> None:
    expected = evaluate(make_model(dtype=torch.float64), make_data(), **QUICK)["results"]
    model = make_model(dtype=torch.float64)
    assert evaluate(model, make_data(), limit=count, batch_size=count, **QUICK)["results"] == expected


# --- labels and channels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_type(dtype: torch.dtype) -> None:
    images, labels = make_data()
    model = make_model(dtype=torch.float64)
    suites = {**QUICK, "suites": ("clean", "fgsm", "pgd", "apgd", "cw"), "eps": (2 / 255,)}
    expected = evaluate(model, (images, labels), **suites)["results"]
    assert evaluate(model, (images, labels.to(dtype)), **suites)["results"] == expected


def test_grey_models_take_grey_images() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.Flatten(), nn.Linear(64, 3))
    model = NormalizedModel(network, [0.5], [0.25])
    data = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    assert evaluate(model, data, suites=("clean", "fgsm"), progress=False)["results"]["fgsm"]
