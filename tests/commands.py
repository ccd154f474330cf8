"""What tests of the command line share."""

from __future__ import annotations

from typing import Any

import pytest

from fastnull.cli import main


def refused(capsys: pytest.CaptureFixture[str], *words: object, bar: bool = False) -> str:
    """The error line of a command, which must be the only one but for notes (and, with `bar`, a progress bar)."""
    capsys.readouterr()
    try:
        code: Any = main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if not line.startswith("note:")]
    assert code == 2, told
    assert bar or len(lines) == 1, told
    assert "Traceback" not in told
    assert lines[-1].startswith("fastnull: error: ")
    return lines[-1]
