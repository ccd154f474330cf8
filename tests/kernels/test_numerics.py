"""Runs the tests of interpreted/ in Triton's interpreter.

In a process of its own: Triton reads TRITON_INTERPRET when it is imported, and no other test is to see it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "interpreted"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"the kernels fail in the interpreter:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
