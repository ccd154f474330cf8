"""Writing tensors as safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from fastnull.record import replacing


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (on any device) to a safetensors file, atomically (`replacing`).

    The format holds dense tensors without shared memory: tied weights and views are written once per name, and strides
    are not kept.

    Raises:
        TypeError: a value that is not a tensor, or a sparse or quantised one.
        ValueError: a tensor on the meta device.
        OSError: the file cannot be written, for example because the disk is full; the old file is kept.
    """
    from safetensors.torch import save

    # as bytes: safetensors' own writer hides the system's error and leaves files behind when killed
    content = save({name: _dense(name, value) for name, value in tensors.items()}, dict(metadata))
    with replacing(path) as beside:
        beside.write_bytes(content)


def _dense(name: str, value: Tensor) -> Tensor:
    """A dense copy on the CPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"{name} must be a dense tensor; got {value.layout}{', quantised' * value.is_quantized}")
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
