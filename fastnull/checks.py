"""Checks of arguments. Each raises one error that names the argument, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

RANGE_TOLERANCE = 1e-6
"""How far outside [0, 1] a pixel may be: resampling in float32 gives values such as -3e-8."""

SUM_TOLERANCE = 0.01
"""How far from 1 the sum of an image's probabilities may be: 16-bit ones are rounded."""

_CPU_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "fastnull: no memory for",  # csrc/cpu
    "std::bad_alloc",
)
"""Texts of RuntimeErrors for a CPU out of memory: torch's allocator (Linux and macOS, Windows), our ops, C++."""

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusted_values(trusted: bool = True) -> Iterator[None]:
    """Inside, checks look only at shapes and dtypes: reading values makes the host wait for the device.

    For callers that checked the values before. With `trusted` False nothing changes.
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
    """Whether an error means that a device is out of memory; on a CPU only its text shows it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_OUT_OF_MEMORY)


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value` if it is in `allowed`; otherwise raise a ValueError that lists them and suggests the nearest."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.{hint}")


def refuse_renamed(
    owner: str, given: Iterable[str], renamed: Mapping[str, str], error: type[Exception] = TypeError
) -> None:
    """Raise an error with the new names if settings are given by old ones; `renamed` is old → new."""
    old = [name for name in given if name in renamed]
    if old:
        now = ", ".join(f"{name} is now {renamed[name]}" for name in old)
        raise error(f"{owner} uses names of settings from before version 0.2: {now}")


def check_fields(config: Any) -> None:
    """Check and convert (`as_type`) every field of a dataclass by its annotation; for its `__post_init__`.

    Raises:
        TypeError: a value of another type; the message names the field, the type and the value.
        ValueError: NaN for a number.
    """
    for name, hint in _hints(config.__class__).items():
        object.__setattr__(config, name, as_type(name, getattr(config, name), hint))  # also if it is frozen


def as_type(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type.

    A bool is not accepted as a number; an int is accepted as a float. NumPy scalars become Python's, a path becomes a
    string if the type is a string, and a sequence a tuple if the type is a tuple.

    Args:
        name: of the value, for the message.
        hint: a class, Any, None, a tuple or mapping of those, or a union of those.

    Raises:
        TypeError, ValueError: as `check_fields`.
    """
    numpy = sys.modules.get("numpy")  # if it is not imported there are no NumPy scalars
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if kind is Any:
            return value
        if origin in (int, float):
            if isinstance(value, (int, origin)) and not isinstance(value, bool):
                if value != value:
                    raise ValueError(f"{name} must be {_described(hint)}; got {value!r}")
                return value
        elif origin is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        elif origin is tuple:
            if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
                return _tuple(name, value, typing.get_args(kind))
        elif origin in (dict, Mapping):
            if isinstance(value, Mapping):
                return _mapping(name, value, typing.get_args(kind))
        elif isinstance(value, origin):
            return value
    raise TypeError(f"{name} must be {_described(hint)}; got {value!r} of type {type(value).__name__}")


def _tuple(name: str, values: Sequence[Any], kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values as a tuple of the annotated types: (T, ...) is any number of T, () any values."""
    if not kinds:
        return tuple(values)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(kinds) != len(values):
        raise TypeError(f"{name} must hold {len(kinds)} values; got {values!r}")
    return tuple(as_type(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(values, kinds, strict=True)))


def _mapping(name: str, values: Mapping[Any, Any], kinds: tuple[Any, ...]) -> dict[Any, Any]:
    key_kind, kind = kinds or (Any, Any)
    return {as_type(f"a key of {name}", k, key_kind): as_type(f"{name}[{k!r}]", v, kind) for k, v in values.items()}


def _described(hint: Any) -> str:
    """An annotated type in words."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_described, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        kinds = [kind for kind in typing.get_args(hint) if kind is not Ellipsis]
        return f"a tuple whose values are each {' or '.join(dict.fromkeys(map(_described, kinds)))}"
    words = {int: "an integer", float: "a number", bool: "True or False", str: "a string", type(None): "None"}
    words |= {dict: "a mapping", Mapping: "a mapping", tuple: "a tuple"}
    kind = typing.get_origin(hint) or hint
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"


@functools.cache
def _hints(config: type[Any]) -> dict[str, Any]:
    """Field → annotated type of a dataclass."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def check_number(
    name: str, value: float, low: float | None = None, high: float | None = None, *, exclusive: bool = False
) -> None:
    """Raise ValueError unless low <= value <= high (low < value if `exclusive`) and finite; TypeError for no number."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number; got {value!r} of type {type(value).__name__}")
    above = low is None or (value > low if exclusive else value >= low)
    below = high is None or value <= high
    if above and below and (isinstance(value, int) or math.isfinite(value)):
        return
    bounds = []
    if low is not None:
        bounds.append(f"{'>' if exclusive else '>='} {low:g}")
    if high is not None:
        bounds.append(f"<= {high:g}")
    raise ValueError(f"{name} must be {' and '.join(bounds) or 'a finite number'}; got {value!r}")


def check_device(device: str | torch.device) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1"; ValueError if torch does not know it or cannot use it."""
    try:
        found = torch.device(device)
        if isinstance(device, str) and str(found) != device:  # numbers above 127 wrap around
            raise RuntimeError
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be cpu, cuda, cuda:0 or another of torch's; got {device!r}") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            built = "" if torch.version.cuda or torch.version.hip else " (this torch was built without CUDA)"
            raise ValueError(f"device {str(found)!r} does not exist: torch sees {count} CUDA devices{built}")
    elif found.type != "cpu":
        try:
            torch.zeros(1, device=found).cpu()
        except Exception as error:  # every backend has its own class
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"device {str(found)!r} cannot be used here: {first}") from error
    return found


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError with the numbers of NaN and Inf, if there are any."""
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
    """Check a batch of images [B, C, H, W]: a floating tensor, finite and, if `unit_range`, within [0, 1].

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: another shape, NaN or Inf, or pixels outside [0, 1].
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
    if labels.ndim == 2 and not labels.is_complex():
        if labels.shape[1] != num_classes:
            raise ValueError(f"soft {name} must have {num_classes} classes; got {labels.shape[1]}")
        check_finite(name, labels)
        return
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        given = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{name} must be integers [B] or soft labels [B, classes]; got {given}")
    if labels.numel() and not values_are_trusted():
        low, high = (int(x) for x in torch.aminmax(labels.long()))  # torch cannot compare uint16
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must lie in 0..{num_classes - 1}; got values from {low} to {high}")


def as_labels(labels: Tensor, num_classes: int, batch: int, *, name: str = "labels") -> Tensor:
    """Labels for a cross entropy: class indices [B] in int64, or probabilities [B, num_classes] in float32.

    Takes integers of any width, bools, one-hot and soft labels of any dtype.

    Raises:
        TypeError, ValueError: as `check_labels`; soft labels that are not probabilities.
    """
    check_labels(labels, num_classes, batch, name=name)
    if labels.ndim == 1:
        return labels.long()
    labels = labels.float()
    if not values_are_trusted() and len(labels):
        low, sums = labels.min(), labels.sum(1)
        worst = sums[(sums - 1).abs().argmax()]
        if low < 0 or abs(worst - 1) > SUM_TOLERANCE:
            raise ValueError(
                f"soft {name} must be probabilities, each >= 0 and 1 in sum; got a value of {low:.4g} and a sum of "
                f"{worst:.4g}"
            )
    return labels
