"""What README shows works: its Python runs, and its commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastnull.cli import parser as cli

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every `fastnull ...` line, without its comment."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("fastnull ")]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", commands())
def test_command_is_understood(line: str) -> None:
    cli._parser().parse_args(shlex.split(line)[1:])


def test_there_is_something_to_test() -> None:
    assert blocks("python")
    assert {line.split()[1] for line in commands()} >= {"inspect", "finetune", "evaluate", "compare"}
