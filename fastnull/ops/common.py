"""Helpers of all ops: allocation that tests can poison, definition of an op with its reference, choice of the backend.

Each op has one schema in `torch.ops.fastnull` and only writes into given tensors, so its fake does nothing. The
pure-torch reference serves every device (key CompositeExplicitAutograd); native libraries add faster kernels for a
device. None of the ops has an autograd kernel: the public functions wrap them in an `autograd.Function`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastnull import _C
from fastnull.checks import check_choice

OPS = (
    "attention",
    "layer_norm",
    "linear_gelu",
    "noise_objective",
    "noise_step",
    "patch_project",
)
"""Names of the ops, which are the names of their files."""

LIBRARY = torch.library.Library("fastnull", "FRAGMENT")
REFERENCES: dict[str, Callable[..., None]] = {}
"""Name in `torch.ops.fastnull` → reference, for every op."""
# dtypes of the C++ ops on the CPU, and of the Triton kernels
NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
OLDEST_GPU = (8, 0)  # older tensor cores do not support bfloat16

told: set[torch.device] = set()
"""GPUs for which a warning was given that the kernels do not run there."""

_allocate = torch.empty  # fastnull.testing.poisoned swaps it


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised dense tensor: all outputs of ops are made here, so that tests can fill them with NaN."""
    return _allocate(tuple(shape), dtype=dtype, device=device)


def define(schema: str, reference: Callable[..., None]) -> None:
    """Define `torch.ops.fastnull.<name>` by its schema, with `reference` for every device and a fake.

    `reference` takes the schema's arguments and writes into the mutable ones.
    """
    name = schema.split("(", 1)[0]
    REFERENCES[name] = reference
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")

    def fake(*args: object) -> None:
        """Outputs are arguments, so there is no shape to infer."""

    torch.library.register_fake(f"fastnull::{name}", fake, lib=LIBRARY)


def _named(names: Sequence[str], where: str) -> frozenset[str]:
    return frozenset(check_choice(where, name, OPS) for name in names)


_on_reference = _named(
    [name for name in os.environ.get("FASTNULL_REFERENCE_OPS", "").replace(" ", "").split(",") if name],
    "FASTNULL_REFERENCE_OPS",
)


@contextmanager
def references(*names: str) -> Iterator[None]:
    """Run these ops (by default all) on their torch references inside the block, on every device.

    FASTNULL_REFERENCE_OPS=attention,layer_norm does so for the whole process. The backend of an encoder does not
    change; its code runs on the references.

    Raises:
        ValueError: a name is not one of OPS.
    """
    global _on_reference
    before, _on_reference = _on_reference, _on_reference | _named(names or OPS, "op")
    try:
        yield
    finally:
        _on_reference = before


def use_native(op: str, *tensors: Tensor | None) -> bool:
    """True if a native kernel of the op is available and supports the device and dtypes of these tensors."""
    if op in _on_reference:
        return False
    given = [t for t in tensors if t is not None]
    device = given[0].device
    if any(t.device != device or t.dtype not in NATIVE_DTYPES.get(device.type, ()) for t in given):
        return False
    return _C.cpu_available() if device.type == "cpu" else not _C._disabled and _gpu_serves(device)


@functools.cache
def _gpu_serves(device: torch.device) -> bool:
    if switched_off():
        return False
    problem = gpu_problem(device)
    if problem and device not in told:
        install = "Install it with `pip install fastnull[triton]`, or set" if "need Triton" in problem else "Set"
        warnings.warn(
            f"fastnull runs its torch references on {device}, slower: {problem}. "
            f"{install} FASTNULL_NATIVE=0 to silence this.",
            RuntimeWarning,
            stacklevel=4,
        )
    return not problem


def switched_off() -> bool:
    """True if the user has switched off all native code."""
    return _C._disabled or os.environ.get("FASTNULL_NATIVE") == "0"


@functools.cache
def gpu_problem(device: torch.device) -> str:
    """Why no kernel runs on this GPU; empty if some do: those of Triton, or of csrc/cuda if nvcc built them. The first
    call imports them and registers the dispatchers of all ops."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        have, need = (f"sm_{major}{minor}" for major, minor in (capability, OLDEST_GPU))
        return f"the kernels need a GPU of at least {need}, this one is {have}"
    problem = triton_problem()
    if problem and not _C.cuda.load():
        return problem
    register_choices()
    return ""


@functools.cache
def triton_problem() -> str:
    """Why the Triton kernels cannot be imported; empty if they can."""
    try:
        import fastnull.kernels  # noqa: F401
    except ImportError as failure:
        return f"the kernels need Triton ({failure})"
    return ""


@functools.cache
def register_choices() -> None:
    """Register the dispatchers (fastnull/ops/dispatch.py) of all ops for CUDA tensors."""
    from fastnull.ops.dispatch import SIGNATURES, dispatcher

    for name in SIGNATURES:
        LIBRARY.impl(name, dispatcher(name), "CUDA")


def check_positive(name: str, value: int) -> None:
    """Raise TypeError or ValueError unless value is an integer of at least 1: kernels divide by it."""
    if torch.compiler.is_compiling():  # it may be a symbol; the kernel checks its value
        return
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """True if autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def no_autocast(device: torch.device) -> torch.autocast:
    """Disable autocast inside, so that arithmetic is in the dtypes of the tensors."""
    return torch.autocast(device.type, enabled=False)


def in_autocast(device: torch.device) -> bool:
    """True inside the caller's autocast region for this device; False for devices without autocast, such as meta."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x: Tensor) -> Tensor:
    """x [..., D] as [outer, inner, D] with a dense last dimension: a view where the strides allow it, else a copy."""
    if x.ndim != 3:
        x = x.reshape(1, x.shape[:-1].numel(), x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_out(y: Tensor, name: str) -> Tensor:
    """`rows` of an output: always a view.

    Raises:
        ValueError: the strides of y allow no such view.
    """
    if y.stride(-1) != 1 and y.shape[-1] != 1:
        raise ValueError(f"the last dimension of {name} must be dense; its strides are {y.stride()}")
    try:
        if y.ndim == 3:
            return y
        outer, inner = (1, y.shape[:-1].numel()) if y.ndim < 3 else (y.shape[:-2].numel(), y.shape[-2])
        return y.view(outer, inner, y.shape[-1])
    except RuntimeError as failure:
        raise ValueError(f"the leading dimensions of {name} must flatten to two; strides {y.stride()}") from failure
