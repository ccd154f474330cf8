"""A plugin of pytest, for xdist (`-p tests.gpu.lost_device -n 8`): after a CUDA error a process cannot use the GPU any
more, so the worker that met one says so and ends itself. xdist counts the test as failed and starts another worker."""

from __future__ import annotations

import os
import re
import sys

import pytest

LOST = re.compile(r"CUDA error|Error \[CUDA\]")


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo[object]) -> None:
    """Called where a test raises."""
    text = str(call.excinfo.value) if call.excinfo is not None else ""
    if "PYTEST_XDIST_WORKER" in os.environ and LOST.search(text):
        print(f"lost device in {node.nodeid}: {text.strip().splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(70)
