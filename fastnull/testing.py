"""Helpers for tests of the ops: inputs, buffers filled with NaN, choice of the backend, comparators.

The rule of the comparators: the error against float64 may be at most twice that of torch in the same dtype, plus a
rounding of the largest value. Their own tests are in tests/test_testing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastnull import _C
from fastnull.ops import common

COSINE_MARGIN = {torch.float64: 1e-12, torch.float32: 1e-8, torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""Allowed difference from 1 of the cosine between a gradient and its float64 reference."""


def cpu_backends() -> list[str]:
    """The implementations for CPU tensors on this machine: the reference, and each processor level of the C++ ops."""
    return ["reference", *_C.cpu_levels()]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block on one of `cpu_backends()`."""
    with _C.disabled() if name == "reference" else _C.forced_cpu_level(name):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every buffer that ops allocate with NaN (integers: 0xEE), so that unwritten values show."""

    def allocate(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        fill = float("nan") if dtype.is_floating_point else 0xEE
        return torch.full(shape, fill, dtype=dtype, device=device)

    before = common._allocate
    common._allocate = allocate  # type: ignore[assignment]
    try:
        yield
    finally:
        common._allocate = before


def randn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, *, strided: bool = True) -> Tensor:
    """A normal tensor; if `strided`, a slice of a larger one that is NaN elsewhere, with a dense last dimension."""
    values = torch.randn(tuple(shape), generator=generator).to(dtype)
    if not strided or values.ndim == 0:
        return values
    outer = [n + 2 for n in shape[:-1]] + [shape[-1] + 8]
    # offset of 3 elements: vector loads must not rely on the alignment of a new allocation
    window = torch.full(outer, float("nan"), dtype=dtype)[tuple(slice(1, 1 + n) for n in shape[:-1])]
    window = window[..., 3 : 3 + shape[-1]]
    window.copy_(values)
    return window


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def error_budget(reference: Tensor, baseline: Tensor) -> float:
    """Largest error allowed: 2 * (error of `baseline` + eps(its dtype) * max|reference|).

    Args:
        reference: float64.
        baseline: the same quantity by an independent torch path in the dtype under test.
    """
    rounding = torch.finfo(baseline.dtype).eps * _largest(reference)
    return 2 * (_largest(baseline.double() - reference) + rounding)


def assert_within_budget(actual: Tensor, reference: Tensor, baseline: Tensor, name: str = "result") -> None:
    """Raise AssertionError unless `actual` is finite, of the right shape, and within `error_budget` everywhere."""
    assert reference.dtype == torch.float64, f"the reference of {name} must be float64; got {reference.dtype}"
    assert actual.shape == reference.shape, f"{name}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    bad = int((~torch.isfinite(actual)).sum())
    assert bad == 0, f"{name}: {bad} of {actual.numel()} values are not finite"
    error, budget = _largest(actual.double() - reference), error_budget(reference, baseline)
    assert error <= budget, f"{name}: error {error:.3g} exceeds {budget:.3g} (max|reference| {_largest(reference):.3g})"


def assert_gradient_close(actual: Tensor, reference: Tensor, baseline: Tensor, name: str = "gradient") -> None:
    """`assert_within_budget`, and as a direction: cosine, relative L2 error, and no common bias.

    The relative L2 error may be twice that of `baseline` plus eps. The bias is the mean error relative to the mean
    magnitude: rounding averages out over many elements, a wrong term does not.
    """
    assert_within_budget(actual, reference, baseline, name)
    norm = reference.norm().item()
    if norm == 0:
        return
    eps = torch.finfo(baseline.dtype).eps
    error, base_error = actual.double() - reference, baseline.double() - reference
    relative, allowed = error.norm().item() / norm, 2 * (base_error.norm().item() / norm + eps)
    assert relative <= allowed, f"{name}: relative L2 error {relative:.3g} exceeds {allowed:.3g}"
    cosine = torch.nn.functional.cosine_similarity(actual.double().flatten(), reference.flatten(), dim=0).item()
    margin = COSINE_MARGIN[baseline.dtype]
    assert cosine >= 1 - margin, f"{name}: cosine 1 - {1 - cosine:.3g}, allowed 1 - {margin:g}"
    if reference.numel() >= 256:
        bias = abs(error.mean().item()) / reference.abs().mean().item()
        limit = 2 * (abs(base_error.mean().item()) / reference.abs().mean().item() + eps)
        assert bias <= limit, f"{name}: mean error is {bias:.3g} of the mean magnitude, allowed {limit:.3g}"


def opcheck(name: str, arguments: tuple[object, ...]) -> None:
    """`torch.library.opcheck` of `torch.ops.fastnull.<name>`."""
    op: Callable[..., None] = getattr(torch.ops.fastnull, name).default
    torch.library.opcheck(op, arguments)
