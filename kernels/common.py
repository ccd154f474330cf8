"""Helpers of all launchers: device to launch on, dtype checks and compile options."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Set at every launch, because Triton announced a change of the default, which would change results and speed.
COMPILE = {"enable_fp_fusion": True}


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def generation_of(x: Tensor) -> int:
    """`generation` of the tensor's GPU; 80 for CPU tensors (in the interpreter)."""
    return _generation(x.device) if x.is_cuda else 80


def generation(major: int) -> int:
    """80, 90 or 100: the tensor-core instructions of a GPU of compute capability `major`. sm_120 has those of sm_80."""
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


@functools.cache
def _generation(device: torch.device) -> int:
    return generation(torch.cuda.get_device_capability(device)[0])


def check_dtypes(**tensors: Tensor | None) -> None:
    """Check dtypes: the kernels compute in float32, so float64 would silently lose precision.

    Raises:
        TypeError: a tensor is not float32, bfloat16 or float16.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 for the Triton kernels; got {tensor.dtype}")


def check_dense(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that is not dense, which the kernel would address wrongly."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be dense; its strides are {tensor.stride()}")
