"""The one place that loads native code, lazily, and says once why it could not.

`_C_cpu.so` is loaded at the first use of an op on CPU tensors, `_C_cuda.so` at the first use on CUDA tensors; importing
the package loads neither. Loading registers the library's kernels with the `torch.ops.fastnull` ops that
`fastnull.ops` defines. Without the libraries those ops run their reference.

Environment (read when the library is loaded): FASTNULL_NATIVE=0 keeps it out; FASTNULL_CPU_LEVEL names the processor
level (portable, avx2, avx512, avx512_bf16, avx512_bf16_dot; default: the best this processor has, and the
last only where its bfloat16 dot products are fast).

A library is loaded only if its digest is the one that the build wrote down: to load a cut or foreign file can end the
process.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DIRECTORY = Path(__file__).resolve().parent
RECORD = "_build.json"
# Of each library: the dispatch key, the namespace, and the ops it registers kernels for there.
KERNELS = {
    "_C_cpu": (
        "CPU",
        "fastnull",
        "attention_out attention_dqkv_out gelu_out dgelu_ layer_norm_out layer_norm_dx_out noise_objective_out "
        "adamw_step_ direct_step_ patch_project_out",
    ),
    "_C_cuda": (
        "CUDA",
        "fastnull_cuda",
        "attention_out attention_dqkv_out noise_objective_out noise_objective_means_out "
        "adamw_step_ direct_step_ patch_project_out",
    ),
}


def build_record() -> dict[str, Any]:
    """What setup.py wrote when it built (or did not build) the libraries; empty if it never ran here.

    A record that cannot be read is {"unreadable": why}.
    """
    try:
        record = json.loads((DIRECTORY / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as failure:
        return {"unreadable": f"{RECORD}: {failure}"}
    return record if isinstance(record, dict) else {"unreadable": f"{RECORD} is no mapping"}


class Library:
    """One shared object beside this file: loaded once, its failure remembered and explained once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded = False
        self.error: str | None = None
        self._tried = False
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        return DIRECTORY / f"{self.name}.so"

    def load(self) -> bool:
        """True if the library's kernels are registered; the first call loads them."""
        if not self._tried:
            with self._lock:
                if not self._tried:
                    self._load()
                    self._tried = True
        return self.loaded

    def _load(self) -> None:
        if os.environ.get("FASTNULL_NATIVE") == "0":
            self.error = "switched off by FASTNULL_NATIVE=0"
            return
        if self.name == "_C_cuda" and torch.version.cuda is None:
            self.error = f"torch {torch.__version__} is built without CUDA"
            return
        record = build_record()
        own = record.get(self.name.removeprefix("_C_"))
        own = own if isinstance(own, dict) else {}
        if not self.path.exists():
            missing = record.get("missing") or own.get("missing")
            self.error = f"not built: {missing or f'there is no {self.path.name} beside the package'}"
            return
        self.error = self._wrong_digest(record, own.get("sha256")) or self._refused(record)
        self.loaded = self.error is None
        if not self.loaded:
            warnings.warn(
                f"fastnull runs without its native code, slower: {self.error}. "
                "Reinstall it in this environment, or set FASTNULL_NATIVE=0 to silence this.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _wrong_digest(self, record: dict[str, Any], digest: object) -> str | None:
        """Why the file is not the one that was built; None where it is."""
        if digest is None:
            why = record.get("unreadable", f"{RECORD} holds none")
            return f"{self.path.name} is not loaded: there is no digest to know it by ({why})"
        try:
            found = hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as failure:
            return f"{self.path.name} cannot be read: {failure}"
        if found != digest:
            return (
                f"{self.path.name} is not the file that was built (cut short or replaced): its sha256 is {found[:12]}…"
            )
        return None

    def _refused(self, record: dict[str, Any]) -> str | None:
        """Load the library; why it does not serve, or None."""
        try:
            torch.ops.load_library(str(self.path))
        except (OSError, RuntimeError) as failure:
            return (
                f"{self.path.name} does not load into torch {torch.__version__} (built against torch "
                f"{record.get('torch_headers', '?')}, for torch >= {record.get('torch_minimum', '?')}, by "
                f"{record.get('compiler', '?')}): {failure}"
            )
        key, namespace, names = KERNELS[self.name]
        lacking = [name for name in names.split() if not _has_kernel(f"{namespace}::{name}", key)]
        return f"{self.path.name} lacks the kernels of {', '.join(lacking)}" if lacking else None


def _has_kernel(op: str, key: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, key))
    except RuntimeError:  # no such op
        return False


cpu = Library("_C_cpu")
cuda = Library("_C_cuda")
_disabled = False


def cpu_available() -> bool:
    """True if the C++ ops serve CPU tensors; loads them on the first call."""
    if _disabled:
        return False
    if cpu._tried:
        return cpu.loaded
    loaded = cpu.load()
    level = os.environ.get("FASTNULL_CPU_LEVEL")
    if loaded and level:
        set_cpu_level(level)
    return loaded


def cpu_levels() -> list[str]:
    """Processor levels that were built and that this processor has, plainest first; empty without the library."""
    return torch.ops.fastnull._cpu_levels().split(",") if cpu_available() else []


def cpu_level() -> str | None:
    """The processor level in use; None without the library."""
    return torch.ops.fastnull._cpu_level() if cpu_available() else None


def set_cpu_level(name: str) -> None:
    """Use this processor level from now on.

    Raises:
        RuntimeError: the library is not loaded.
        ValueError: the level was not built or this processor lacks it.
    """
    if not cpu_available():
        raise RuntimeError(f"there are no C++ ops to choose a level of: {cpu.error}")
    if not torch.ops.fastnull._set_cpu_level(name):
        raise ValueError(f"the CPU level must be one of {', '.join(cpu_levels())}; got {name!r}")


@contextmanager
def forced_cpu_level(name: str) -> Iterator[None]:
    """Run the block at this processor level, all threads included."""
    before = cpu_level()
    set_cpu_level(name)
    assert before is not None
    try:
        yield
    finally:
        set_cpu_level(before)


@contextmanager
def disabled() -> Iterator[None]:
    """Run the block on the references, as if the libraries had not been built."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before
