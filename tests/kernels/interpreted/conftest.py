"""The Triton kernels behind the public functions of fastnull.ops, for the tests in this folder.

Where TRITON_INTERPRET=1 (test_numerics.py sees to that) they run on the CPU in Triton's interpreter, in float16 and
float32: it gets bfloat16 wrong. Where there is a GPU they run on it. Otherwise the folder holds no tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

_launched: list[str] = []


def _counted(name: str, launcher: Callable[..., None]) -> Callable[..., None]:
    def launch(*args: object) -> None:
        _launched.append(name)
        launcher(*args)

    return launch


@pytest.fixture(scope="session", autouse=True)
def _kernels_serve() -> None:
    """CPU tensors take the path of CUDA tensors: same dtypes, and the launchers under the ops' CPU key."""
    from fastnull import _C
    from fastnull.kernels import LAUNCHERS
    from fastnull.ops import common

    key = "CPU" if INTERPRETED else "CUDA"
    if INTERPRETED:
        common.NATIVE_DTYPES["cpu"] = common.NATIVE_DTYPES["cuda"]
        _C.cpu_available = lambda: True
    for name, launcher in LAUNCHERS.items():
        common.LIBRARY.impl(name, _counted(name, launcher), key, allow_override=not INTERPRETED)


@pytest.fixture(autouse=True)
def _a_kernel_ran() -> Iterator[None]:
    """A test that took the reference by mistake would prove nothing."""
    _launched.clear()
    yield
    assert _launched, "no Triton kernel was launched"
