"""Devices, dtypes and inputs of the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnull import testing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def randn(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """`testing.randn` on the device: a slice of a larger tensor that is NaN elsewhere."""
    x = testing.randn(shape, dtype, torch.Generator().manual_seed(seed))
    whole = torch.empty(0, dtype=dtype).set_(x.untyped_storage())
    return whole.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output to be overwritten: NaN, or 0xEE for bytes."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 0xEE, dtype=dtype, device=DEVICE)
