"""What docs/analyses.md shows works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastnull.cli import parser as cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "analyses.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "python"])
def test_python_runs(block: str) -> None:
    pytest.importorskip("scipy")
    exec(compile(block, PAGE.name, "exec"), {"__name__": "page"})


def test_commands_are_understood() -> None:
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert len(lines) == 3
    for line in lines:
        cli._parser().parse_args(shlex.split(line)[1:])


def test_figures_are_there_and_small() -> None:
    figures = re.findall(r"\]\((figures/\S+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(figures) == 4
    assert all((PAGE.parent / name).stat().st_size < 150_000 for name in figures)
