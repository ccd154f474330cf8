"""What every launcher needs: the device to launch on, checks of dtypes, and compile options."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Set at every launch: Triton announced another default, which would change numbers and speed.
COMPILE = {"enable_fp_fusion": True}


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def generation_of(x: Tensor) -> int:
    """`generation` of the tensor's GPU; 80 where it is on none, as in the interpreter."""
    return _generation(x.device) if x.is_cuda else 80


def generation(major: int) -> int:
    """80, 90 or 100: whose tensor-core instructions a GPU of compute capability `major` has. sm_120 has sm_80's."""
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


@functools.cache
def _generation(device: torch.device) -> int:
    return generation(torch.cuda.get_device_capability(device)[0])


def check_dtypes(**tensors: Tensor | None) -> None:
    """The kernels compute in float32: float64 would silently lose precision.

    Raises:
        TypeError: a tensor is neither float32 nor bfloat16 nor float16.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 for the Triton kernels; got {tensor.dtype}")


def check_dense(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor whose elements the kernel would address wrongly because it is not dense."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be dense; its strides are {tensor.stride()}")
