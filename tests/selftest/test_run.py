"""What is kept of the self-test, who runs it, and what its switch does. Processes are real where two meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastnull import choices
from fastnull.choices import Outcome
from fastnull.record import device_name
from fastnull.selftest import prove, run, store, table
from fastnull.selftest.problems import Problem

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem("noise_objective_out", (torch.float32, (4,)))
FOUND = {
    PROBLEM.name: {
        "library": Outcome(ms=2.0, error=0.0, floor=0.1),
        "cpu": Outcome(ms=1.0, error=0.0, floor=0.2),
        "triton": Outcome(problem="wrong: loss: error 1 exceeds 0.1"),
    }
}


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no results, and a process that has none in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(choices.SWITCH, raising=False)
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, empty in (
        (choices, "_found", dict), (choices, "_pinned", dict), (run, "_told", set), (run, "_tried", set),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, empty())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The problems of each run of the self-test, which finds FOUND."""
    seen: list[list[str]] = []

    def outcomes(problems: list[str], device: torch.device, images: int, tiles: bool) -> dict[str, choices.Found]:
        seen.append(problems)
        return dict.fromkeys(problems, FOUND[PROBLEM.name])

    monkeypatch.setattr(run, "outcomes", outcomes)
    return seen


def prove_quietly(**options: str) -> dict[str, choices.Found]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prove([PROBLEM], CPU, **options)


def test_what_is_left_out_is_said_in_a_line_and_the_fastest_is_taken(
    runs: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(RuntimeWarning, match="noise_objective_out float32 4: the triton kernel is not used here: wrong"):
        assert prove([PROBLEM], CPU) == FOUND
    assert choices.ranked(device_name(CPU), PROBLEM.name) == ["cpu", "library"]
    assert capsys.readouterr().err.count(f"checking kernels on {device_name(CPU)}, once") == 1
    rows = {row[1]: row for row in table(FOUND)[1:]}
    assert [row[-1] for row in rows.values()] == ["", "<", "wrong: loss: error 1 exceeds 0.1"]
    assert rows["cpu"][2:4] == ("1.0000", "20 %")


def test_it_runs_once_a_machine(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Again only for problems that nobody had, where it is forced (once a process), and never where it is off."""
    other = Problem("noise_objective_out", (torch.float32, (7,)))
    prove_quietly()
    prove_quietly()
    forget(monkeypatch)
    assert prove_quietly() == FOUND
    with pytest.warns(RuntimeWarning, match="not used"):
        prove([PROBLEM, other], CPU)
    assert runs == [[PROBLEM.name], [other.name]]
    monkeypatch.setenv(choices.SWITCH, "force")
    forget(monkeypatch)
    for _ in range(2):
        prove_quietly()
    assert runs[2:] == [[PROBLEM.name]]
    assert prove_quietly(asked="off") == {}
    monkeypatch.setenv(choices.SWITCH, "sometimes")
    with pytest.raises(ValueError, match="FASTNULL_SELFTEST must be one of 'auto', 'off', 'force'; got 'sometimes'"):
        prove([PROBLEM], CPU)
    monkeypatch.delenv(choices.SWITCH)
    with pytest.raises(ValueError, match="selftest must be one of"):
        prove([PROBLEM], CPU, asked="yes")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"identity": 3, "results": {}}', "\x00\xff", '{"identity": IDENTITY, "results": [1]}']
    + ['{"identity": IDENTITY, "results": {"a": {"b": {"ms": "fast"}}}}']
    + ['{"identity": IDENTITY, "results": {"a": {"b": {"seconds": 1}}}}'],
)
def test_a_file_that_is_damaged_or_foreign_is_made_anew(runs: list[list[str]], text: str) -> None:
    path = store.path(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("IDENTITY", json.dumps(store.identity(CPU))), encoding="latin-1")
    assert prove_quietly() == FOUND
    assert len(runs) == 1
    assert store.read(CPU) == FOUND


@pytest.mark.parametrize("changed", ["torch", "build", "device"])
def test_another_version_or_device_has_results_of_its_own(
    runs: list[list[str]], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    prove_quietly()
    about = {**store.identity(CPU), changed: "another"}
    monkeypatch.setattr(store, "identity", lambda device: about)
    forget(monkeypatch)
    prove_quietly()
    assert len(runs) == 2
    assert len(list(store.folder().glob("*.json"))) == 2


@pytest.mark.parametrize("missing", ["folder", "home"])
def test_without_a_cache_folder_it_goes_on_and_says_so_once(
    runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (tmp_path / "file").write_text("")
    if missing == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that the system does not know
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert prove([PROBLEM], CPU) == FOUND
    assert len(runs) == 1, "this process keeps what it found"
    assert len([each for each in seen if "cannot be kept, every process will check" in str(each.message)]) == 1


def test_where_no_process_starts_library_calls_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, tiles: bool) -> None:
        raise RuntimeError("no memory left on the device")

    monkeypatch.setattr(run, "outcomes", fails)
    with pytest.warns(RuntimeWarning, match="kernels cannot be checked on .*using library calls.*no memory left"):
        assert prove([PROBLEM], CPU) == {}
    monkeypatch.setattr(run, "outcomes", None)
    assert prove([PROBLEM], CPU) == {}, "not again in this process"
    assert choices.ranked(device_name(CPU), PROBLEM.name) == []
    assert not list(store.folder().glob("*.json"))


def test_what_lacked_memory_is_checked_again_by_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {PROBLEM.name: {"library": Outcome(ms=1.0), "cuda": Outcome(problem="OutOfMemoryError: no room")}}
    monkeypatch.setattr(run, "outcomes", lambda *_, **__: short)
    assert prove_quietly() == short
    assert store.read(CPU) == {}


def test_of_two_processes_one_runs_and_the_other_waits(tmp_path: Path) -> None:
    code = (
        "import torch; from fastnull.selftest import prove; from fastnull.selftest.problems import Problem\n"
        f"print(sorted(prove([Problem.named({PROBLEM.name!r})], torch.device('cpu'))[{PROBLEM.name!r}]))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    assert sum("checking kernels" in errors for _, errors in ended) == 1, ended
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (store.folder() / ".lock").exists()


def test_a_resumed_run_takes_the_same_implementations_or_says_why_not() -> None:
    """On another machine what was chosen there may be slower here, wrong here, or never have been checked."""
    gpu, problem = "NVIDIA H100", PROBLEM.name
    choices.add(gpu, FOUND)
    assert choices.pin({problem: "library"}, gpu) == []
    assert choices.ranked(gpu, problem) == ["library", "cpu"]
    assert choices.pin({problem: "triton"}, gpu) == [f"{problem}: triton wrong: loss: error 1 exceeds 0.1"]
    assert choices.pin({problem: "cuda", "dgelu_ bfloat16 8": "triton"}, gpu) == [
        f"{problem}: cuda was not checked here", "dgelu_ bfloat16 8: triton was not checked here"
    ]  # fmt: skip
    assert choices.ranked(gpu, problem) == ["cpu", "library"]
    assert choices.pin({"dgelu_ bfloat16 8": "library"}, gpu) == [], "which serves what nobody has checked"
