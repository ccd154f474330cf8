"""Rows of a matrix in eight bits (float8_e4m3fn), each with a scale of its own, for products on 8-bit tensor cores.

    scale[m] = max_k |x[m, k]| / 448          (448 is the largest of float8_e4m3fn; 1 where the row is 0)
    q[m, k]  = x[m, k] / scale[m]             rounded to 4 significant bits

A scale a row, because rows differ: the gradients of two images may be orders of magnitude apart. Nothing overflows, and
a row that holds NaN or infinity gets NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.ops.common import define, empty, rows, use_native

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """q [M, D] in float8_e4m3fn and scale [M] in float32 of x [M, D], in plain torch."""
    wide = x.to(torch.float32)
    scale = wide.abs().amax(1) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale.unsqueeze(1)).to(FLOAT8), scale


def _quantize_rows_out_ref(x: Tensor, q: Tensor, scale: Tensor) -> None:
    code, factor = quantize_rows_ref(x.flatten(0, 1))
    q.copy_(code)
    scale.copy_(factor)


define("quantize_rows_out(Tensor x, Tensor(a!) q, Tensor(b!) scale) -> ()", _quantize_rows_out_ref)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in eight bits; no autograd.

    Args:
        x: [M, D] with D > 0, float32, bfloat16 or float16.

    Returns:
        q [M, D] in float8_e4m3fn, dense, and scale [M, 1] in float32, so that q * scale is x to 4 significant bits.

    Raises:
        ValueError: x is no matrix, or has no columns.
    """
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"x must have shape [M, D] with D > 0; got {list(x.shape)}")
    q = empty(x.shape, dtype=FLOAT8, device=x.device)
    scale = empty((len(x),), dtype=torch.float32, device=x.device)
    if use_native("quantize_rows", x):
        torch.ops.fastnull.quantize_rows_out(rows(x), q, scale)
    else:
        _quantize_rows_out_ref(x.unsqueeze(0), q, scale)
    return q, scale.unsqueeze(1)
