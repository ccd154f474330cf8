"""Checks of what users hand in. Each raises one error that names the argument, what it was and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

RANGE_TOLERANCE = 1e-6
"""How far outside [0, 1] a pixel may lie: resampling in float32 leaves values such as -3e-8."""

_CPU_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "fastnull: no memory for",  # csrc/cpu
    "std::bad_alloc",
)
"""What the RuntimeError of a CPU without memory says: torch's allocator (Linux and macOS, Windows), our ops, C++."""

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusted_values(trusted: bool = True) -> Iterator[None]:
    """Inside, checks look at shapes and dtypes alone: to look at a value makes the host wait for its device.

    For who has checked the values before; where not `trusted`, all is as outside.
    """
    token = _trusted.set(trusted or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def values_are_trusted() -> bool:
    """Whether this runs inside `trusted_values`."""
    return _trusted.get()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left: a GPU has a class for it, a CPU a RuntimeError's text."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_OUT_OF_MEMORY)


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`, else raise ValueError that lists them and suggests the nearest."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.{hint}")


def check_number(
    name: str, value: float, low: float | None = None, high: float | None = None, *, exclusive: bool = False
) -> None:
    """Raise ValueError unless low <= value <= high (low < value where `exclusive`); NaN and Inf never pass."""
    above = low is None or (value > low if exclusive else value >= low)
    below = high is None or value <= high
    if above and below and math.isfinite(value):
        return
    bounds = []
    if low is not None:
        bounds.append(f"{'>' if exclusive else '>='} {low:g}")
    if high is not None:
        bounds.append(f"<= {high:g}")
    raise ValueError(f"{name} must be {' and '.join(bounds) or 'a finite number'}; got {value!r}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError with the number of NaN and Inf if there are any."""
    if values_are_trusted():
        return
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
        raise ValueError(f"{name} must be finite; it holds {nan} NaN and {inf} Inf among {tensor.numel()} values")


def check_images(
    images: Any,
    *,
    name: str = "images",
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    unit_range: bool = True,
) -> None:
    """Check a batch of images [B, C, H, W]: a floating tensor, finite and, where `unit_range`, within [0, 1].

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: another shape, NaN or Inf, or pixels outside [0, 1]; the message holds what was seen.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor [B, C, H, W]; got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype with pixels in [0, 1]; got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"{name} must have shape [B, C, H, W]; got {list(images.shape)}")
    if channels is not None and images.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels; got {images.shape[1]} (shape {list(images.shape)})")
    if size is not None and tuple(images.shape[2:]) != tuple(size):
        raise ValueError(f"{name} must be {size[0]}x{size[1]} pixels; got {images.shape[2]}x{images.shape[3]}")
    if images.numel() == 0:
        return
    check_finite(name, images)
    if unit_range and not values_are_trusted():
        low, high = (x.item() for x in torch.aminmax(images))
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(
                f"{name} must be pixels in [0, 1]; got the range [{low:.4g}, {high:.4g}]. "
                "Normalisation (mean and std) belongs to the model: wrap it in fastnull.vit.NormalizedModel"
            )


def check_labels(labels: Tensor, num_classes: int, batch: int, *, name: str = "labels") -> None:
    """Check class indices [B] (integers within 0..num_classes-1) or soft labels [B, num_classes] (finite)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(labels).__name__}")
    if labels.ndim == 0 or labels.shape[0] != batch:
        raise ValueError(f"{name} must hold one entry per image ({batch}); got shape {list(labels.shape)}")
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise ValueError(f"soft {name} must have {num_classes} classes; got {labels.shape[1]}")
        check_finite(name, labels)
        return
    if labels.ndim != 1 or labels.is_floating_point():
        seen = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{name} must be integers [B] or soft labels [B, classes]; got {seen}")
    if labels.numel() and not values_are_trusted():
        low, high = (int(x) for x in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must lie in 0..{num_classes - 1}; got values from {low} to {high}")
