"""Result files: what they say of their origin, and that no reader sees half of one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnull
from fastnull import record
from fastnull.record import commit, device_name, provenance, replacing, write_json


def test_provenance_is_json_and_names_what_ran() -> None:
    about = json.loads(json.dumps(provenance("cpu", backend="reference", seed=3)))
    assert about["fastnull"] == fastnull.__version__
    assert about["torch"] == torch.__version__
    assert (about["device"], about["backend"], about["seed"]) == ("cpu", "reference", 3)
    assert f"{torch.get_num_threads()} threads" in about["device_name"]
    assert about["date"].endswith("Z")
    assert provenance(torch.device("cpu"))["device_name"] == device_name("cpu")


def test_absent_packages_are_none() -> None:
    assert record.version_of("no-such-package-at-all") is None
    assert record.version_of("torch") is not None


def test_git_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = provenance()
    monkeypatch.setattr(record, "commit", lambda: pytest.fail("asked again"))
    second = provenance(more=1)
    assert second.pop("more") == 1
    assert {**first, "date": second["date"]} == second


def git(folder: Path, *command: str) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.hooksPath=/nowhere")
    run = ["git", *identity, "-C", str(folder), *command]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_commit_marks_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fastnull" / "record.py"
    package.parent.mkdir()
    package.write_text("one")
    monkeypatch.setattr(record, "__file__", str(package))
    assert commit() is None  # an installed package
    git(tmp_path, "init")
    assert commit() is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert commit() == head
    (tmp_path / "untracked").write_text("")
    assert commit() == head
    package.write_text("two")
    assert commit() == head + "+"
    monkeypatch.setenv("PATH", "")  # no git on this machine
    assert commit() is None


def test_write_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "result.json"
    value = {"a": torch.tensor([1.0, 2.0]), "path": Path("x/y"), "dtype": torch.bfloat16, "device": torch.device("cpu")}
    write_json(path, value)
    assert json.loads(path.read_text()) == {"a": [1.0, 2.0], "path": "x/y", "dtype": "torch.bfloat16", "device": "cpu"}
    assert path.read_text().endswith("}\n")
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [math.nan, {"loss": math.inf}, torch.tensor([math.nan]), {"x": object()}])
def test_what_is_no_json_leaves_the_old_file(value: object, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, "old")
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert json.loads(path.read_text()) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def _write_half(path: Path) -> None:
    with replacing(str(path)) as beside:
        beside.write_bytes(b"half")
        raise RuntimeError("disk full")


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    with replacing(path) as beside:
        assert beside.parent == tmp_path  # a rename across file systems would not be atomic
        beside.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(RuntimeError, match="disk full"):
        _write_half(path)
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.bin"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    code = (
        "import os, sys\nfrom fastnull.record import replacing\n"
        f"with replacing({str(path)!r}) as beside:\n"
        "    beside.write_text('half'); os._exit(9)\n"
    )
    root = str(Path(fastnull.__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, check=False)
    assert done.returncode == 9
    assert path.read_text() == "old"
