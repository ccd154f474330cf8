"""Standard output and error that are closed, full or unread: work goes on, and the exit code is that of the work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnull.cli import main
from fastnull.cli.streams import lasting_streams

ROOT = str(Path(main.__code__.co_filename).resolve().parent.parent)
FINETUNE = "finetune --augment none --epochs 1 --train-fraction 0.1 --out 'my run' --overwrite"

EVALUATE = "evaluate --model 'my run/last.safetensors' --suite clean --limit 20 --out results.json"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which `fastnull` is the command line."""
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        ["sh", "-c", line.replace("fastnull", f"{sys.executable} -m fastnull")], cwd=folder, capture_output=True,
        text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("closed", "lines"), [("2>&-", [FINETUNE]), (">&-", [FINETUNE]), ("<&- >&- 2>&-", [FINETUNE, EVALUATE])]
)
def test_a_closed_stream_ends_no_work(closed: str, lines: list[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    commands = " && ".join(f"fastnull {line}" for line in lines)
    done = shell(f"{{ {commands}; }} {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my run" / "last.safetensors").exists()
    if EVALUATE in lines:
        assert json.loads((tmp_path / "results.json").read_text())["results"]["clean"] >= 0
    assert "Traceback" not in done.stderr
    # no file got the number of a closed stream, and with it what was meant for that
    assert "weights: " not in (tmp_path / "my run" / "metrics.jsonl").read_text()
    if closed == "2>&-":
        assert (
            "weights: my run/last.safetensors\nnext: fastnull evaluate --model 'my run/last.safetensors' --data digits"
            in done.stdout
        )


def test_a_reader_who_leaves_is_no_error(tmp_path: Path) -> None:
    # the shell tells the exit code of the first command of the pipe on a stream of its own
    done = shell("{ fastnull inspect vit_digits vit_photos; echo code $? >&2; } | true", tmp_path)
    assert done.stderr == "code 0\n"
    done = shell("{ fastnull finetune --help; echo code $? >&2; } | head -1", tmp_path)
    assert done.stderr == "code 0\n"


def test_errors_keep_their_code_without_a_stream(tmp_path: Path) -> None:
    assert shell("fastnull report nowhere 2>&-", tmp_path).returncode == 2
    assert shell("fastnull report 2>&-", tmp_path).returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_is_lost_is_told(tmp_path: Path) -> None:
    done = shell("fastnull inspect vit_digits >/dev/full", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastnull: error: the work is done, but its output cannot be written: ")
    assert shell("fastnull inspect vit_digits 2>/dev/full", tmp_path).returncode == 0


class Broken(io.StringIO):
    """A stream without a file, which fails after the first write."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [(BrokenPipeError(), False), (ValueError("closed file"), True), (OSError(28, "No space left"), True)],
)
def test_what_fails_is_dropped(error: Exception, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Broken(error), Broken(error)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with lasting_streams() as failed:
        print("one", flush=True)
        print("two", flush=True)
        print("three", file=sys.stderr, flush=True)
        assert sys.stderr.isatty() is False  # what else there is of a stream is there
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.getvalue() == "one\n"
    assert len(failed) == told


def test_streams_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", "vit_digits"]) == 0
    assert main(["report", "nowhere"]) == 2


def test_signs_that_a_stream_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with lasting_streams() as failed:
        print("1 ± 2 points below ε")
    assert not failed
    assert raw.getvalue() == b"1 ? 2 points below ?\n"
