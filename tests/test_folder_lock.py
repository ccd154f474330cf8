"""One process at a time writes in a run's folder, and a dead one holds nothing."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fastnull import folder_lock
from fastnull.finetune.checkpoint import RunFolder
from fastnull.folder_lock import NAME, check_unlocked, locked

fcntl = pytest.importorskip("fcntl")

HOLDER = """
import os, sys, time
from pathlib import Path
from fastnull.folder_lock import locked
with locked(Path(sys.argv[1])):
    holder = os.getpid()
    child = os.fork() if sys.argv[2] == "with a child" else 0
    if not child:  # the child closes its copy of the lock when it begins to run
        print(holder, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLDER, str(folder), how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == process.pid
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


def test_a_second_process_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        message = f"^out {re.escape(str(tmp_path))} is in use by process {process.pid} on .*: wait until it ends"
        for _ in range(2):
            with pytest.raises(ValueError, match=message), locked(tmp_path):
                pass
            with pytest.raises(ValueError, match=message):
                check_unlocked(tmp_path)
        for how in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(ValueError, match=message):
                RunFolder(tmp_path, {}, **how)


@pytest.mark.parametrize("how", ["alone", "with a child"])
def test_a_killed_process_holds_nothing(tmp_path: Path, how: str) -> None:
    """Nor does a child that outlives it, as a loader's workers do for some seconds."""
    with holder(tmp_path, how) as process:
        process.kill()
        process.wait()
        assert (tmp_path / NAME).exists()
        check_unlocked(tmp_path)
        with locked(tmp_path):
            assert (tmp_path / NAME).read_text().startswith(f"process {os.getpid()} on ")
        assert not (tmp_path / NAME).exists()


def test_two_runs_of_one_process_are_two(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
            pass
        other = tmp_path / "other"
        other.mkdir()
        with locked(other):
            pass
    with locked(tmp_path):
        pass
    assert not folder_lock._held
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    check_unlocked(tmp_path)


def test_who_waits_for_a_file_that_is_removed_locks_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fcntl.flock
    seen = []

    def flock(handle: int, how: int) -> None:
        original(handle, how)
        if not seen:
            seen.append(1)
            (tmp_path / NAME).unlink()  # its holder ended between our open and our lock

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="in use"):
            check_unlocked(tmp_path)


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.warns(UserWarning, match="cannot be locked .*No locks available.*do not start a second run"),
        locked(tmp_path),
    ):
        pass
    check_unlocked(tmp_path)


def test_a_run_that_came_between_is_seen(tmp_path: Path) -> None:
    """Both find the folder empty; the second must not write over what the first has finished."""
    second = RunFolder(tmp_path, {"lr": 1})
    first = RunFolder(tmp_path, {"lr": 2})
    with first.locked():
        first.open()
        first.describe({"lr": 2}, "cpu")
    with pytest.raises(ValueError, match="holds a run already"), second.locked():
        pass
    assert not (tmp_path / NAME).exists()
