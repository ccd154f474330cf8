"""Rows in eight bits with a scale each (formulas: ops/quantize_rows).

A program holds whole rows in registers, in LayerNorm's tiles, so x is read once: 3 bytes an element from 16 bits, 5
from 32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dense, check_dtypes, on_device_of
from fastnull.kernels.layer_norm import row_tile


@triton.jit
def quantize_rows_kernel(
    x,  # [outer, inner, D], last dimension dense
    q,  # [outer * inner, D] float8_e4m3fn, dense
    scale,  # [outer * inner] float32
    M,
    inner,
    D,
    x_outer,
    x_inner,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    valid_row = row < M
    valid = valid_row[:, None] & (column < D)
    outer, within = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    values = tl.load(x + (outer * x_outer + within * x_inner)[:, None] + column, valid, 0.0).to(tl.float32)
    # a maximum may pass over NaN; a sum of products with 0 does not: 0, or NaN where a value is NaN or infinite
    largest = tl.max(tl.abs(values), 1) + tl.sum(values * 0, 1)
    factor = tl.where(largest == 0, 1.0, largest / 448)
    tl.store(scale + row, factor, valid_row)
    result = (values / factor[:, None]).to(tl.float8e4nv)
    tl.store(q + row.to(tl.int64)[:, None] * D + column, result, valid)


def quantize_rows_out(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """Launcher of `torch.ops.fastnull.quantize_rows_out`: x [outer, inner, D], dense in D; q and scale dense.

    For GPUs that have float8: sm_89 and later.
    """
    outer, inner, D = x.shape
    check_dtypes(x=x)
    check_dense(q=q, scale=scale)
    if not x.numel():
        return
    M = outer * inner
    constants, tile = row_tile(D)
    with on_device_of(x):
        quantize_rows_kernel[(triton.cdiv(M, tile.rows),)](
            x, q, scale, M, inner, D, *x.stride()[:2], **constants, **COMPILE
        )
