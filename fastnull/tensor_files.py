"""Writing tensors as safetensors: any that hold values, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from fastnull.record import replacing


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, beside and renamed.

    The format holds dense tensors that share no memory: tied weights and views are written once for each name, and
    strides are not kept.

    Args:
        path: of the file.
        tensors: name → tensor, on any device.
        metadata: of the file.

    Raises:
        TypeError: a value that is no tensor, or a sparse or quantised one.
        ValueError: a tensor on the meta device, which has no values.
        OSError: the file cannot be written (a full disk, say); the message names it, and the one before is whole.
    """
    from safetensors.torch import save

    # as bytes: safetensors' own writer hides the system's error, and what it leaves when killed nobody finds
    content = save({name: _dense(name, value) for name, value in tensors.items()}, dict(metadata))
    with replacing(path) as beside:
        beside.write_bytes(content)


def _dense(name: str, value: Tensor) -> Tensor:
    """A copy on the CPU with memory of its own."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device: it has a shape and no values")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"{name} must be a dense tensor; got {value.layout}{', quantised' * value.is_quantized}")
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
