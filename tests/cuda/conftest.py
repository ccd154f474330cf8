"""The emulated kernels, built once a session."""

from __future__ import annotations

import platform
import shutil

import pytest

from tests.cuda import emulated


@pytest.fixture(scope="session")
def kernels() -> object:
    """torch.ops.fastnull_emulated."""
    import torch

    if platform.system() != "Linux":
        pytest.skip("the emulator needs Linux (fibers, guard pages)")
    if shutil.which(emulated.COMPILER.split()[0]) is None:
        pytest.skip(f"no C++ compiler ({emulated.COMPILER} is not on PATH)")
    emulated.load_kernels()
    return torch.ops.fastnull_emulated
