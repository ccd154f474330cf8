"""LayerNorm with its statistics, and its input gradient fused with the residual's gradient (formulas: ops/layer_norm).

A program holds a few whole rows in registers, so each input is read once. Bytes moved (T = bytes of x): forward 2 T,
backward 4 T with dres, 3 T without.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dense, check_dtypes, on_device_of
from fastnull.kernels.tiles import changed


@dataclass(frozen=True)
class RowTile:
    """Rows per program, for widths up to `width` (padded to a power of two)."""

    width: int
    rows: int
    warps: int


# Untuned. A lane holds 16 values of a tensor, up to 32 in the widest rows; with 32 the backward, three tensors at once,
# spills on sm_80 at width 1024. Several rows per program keep enough loads in flight where rows are short.
TILES = (RowTile(512, 4, 4), RowTile(1024, 2, 4), RowTile(2048, 1, 4), RowTile(4096, 1, 8), RowTile(16384, 1, 16))
# Changes that `fastnull selftest --tiles` tries.
CANDIDATES = tuple({"rows": rows, "warps": warps} for rows in (1, 2, 4, 8) for warps in (1, 2, 4, 8))


@triton.jit
def _row_pointers(base, outer, inner, stride_outer, stride_inner):
    """Pointers of rows [ROWS, 1], 64-bit before the product: activations pass 2^31 elements."""
    return base + (outer.to(tl.int64) * stride_outer + inner.to(tl.int64) * stride_inner)[:, None]


@triton.jit
def layer_norm_kernel(
    x,  # [outer, inner, D], last dimension dense
    weight,  # [D] float32, or None
    bias,  # [D] float32, or None
    shift,  # [D] float32, or None
    y,  # [outer, inner, D], may be x
    mean,  # [outer * inner] float32, or None
    rstd,  # [outer * inner] float32
    M,
    inner,
    D,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    valid_row, valid_column = row < M, column < D
    valid = valid_row[:, None] & valid_column
    values = tl.load(_row_pointers(x, row // inner, row % inner, x_outer, x_inner) + column, valid, 0.0).to(tl.float32)
    if shift is not None:
        values += tl.load(shift + column, valid_column, 0.0)
    row_mean = tl.sum(values, 1) / D
    centred = tl.where(valid, values - row_mean[:, None], 0.0)
    row_rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
    result = centred * row_rstd[:, None]
    if weight is not None:
        result *= tl.load(weight + column, valid_column, 0.0)
    if bias is not None:
        result += tl.load(bias + column, valid_column, 0.0)
    tl.store(_row_pointers(y, row // inner, row % inner, y_outer, y_inner) + column, result, valid)
    if mean is not None:
        tl.store(mean + row, row_mean, valid_row)
    tl.store(rstd + row, row_rstd, valid_row)


@triton.jit
def layer_norm_dx_kernel(
    dxhat,  # [outer, inner, D], like x, dres and dx
    x,
    mean,  # [outer * inner] float32; None: x is normalised
    rstd,  # [outer * inner] float32
    dres,  # or None
    dx,  # may be dxhat or dres
    M,
    inner,
    D,
    dxhat_outer,
    dxhat_inner,
    x_outer,
    x_inner,
    dres_outer,
    dres_inner,
    dx_outer,
    dx_inner,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    valid_row = row < M
    valid = valid_row[:, None] & (column < D)
    outer, within = row // inner, row % inner
    g = tl.load(_row_pointers(dxhat, outer, within, dxhat_outer, dxhat_inner) + column, valid, 0.0).to(tl.float32)
    values = tl.load(_row_pointers(x, outer, within, x_outer, x_inner) + column, valid, 0.0).to(tl.float32)
    row_rstd = tl.load(rstd + row, valid_row, 0.0)
    if mean is not None:
        values = (values - tl.load(mean + row, valid_row, 0.0)[:, None]) * row_rstd[:, None]
    # g is 0 outside the row, so the sums need no mask.
    c1, c2 = tl.sum(g, 1) / D, tl.sum(g * values, 1) / D
    result = row_rstd[:, None] * (g - c1[:, None] - values * c2[:, None])
    if dres is not None:
        residual = _row_pointers(dres, outer, within, dres_outer, dres_inner) + column
        result += tl.load(residual, valid, 0.0).to(tl.float32)
    tl.store(_row_pointers(dx, outer, within, dx_outer, dx_inner) + column, result, valid)


def row_tile(D: int) -> tuple[dict[str, int], RowTile]:
    """The launch constants of kernels that hold whole rows of D values, and the tile.

    Raises:
        ValueError: the rows are too wide.
    """
    tile = next((t for t in TILES if t.width >= D), None)
    if tile is None:
        raise ValueError(f"the last dimension of x must be at most {TILES[-1].width} for the kernel; got {D}")
    tile, width = changed(tile), max(triton.next_power_of_2(D), 16)
    return {"ROWS": tile.rows, "WIDTH": width, "num_warps": tile.warps}, tile


def layer_norm_out(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    """Launcher of `torch.ops.fastnull.layer_norm_out`: x, y [outer, inner, D], dense in D; mean, rstd dense."""
    outer, inner, D = x.shape
    check_dtypes(x=x, y=y)
    check_dense(mean=mean, rstd=rstd)
    if not x.numel():
        return
    M = outer * inner
    constants, tile = row_tile(D)
    with on_device_of(x):
        layer_norm_kernel[(triton.cdiv(M, tile.rows),)](
            x, weight, bias, shift, y, mean, rstd, M, inner, D, *x.stride()[:2], *y.stride()[:2], eps,
            **constants, **COMPILE,
        )  # fmt: skip


def layer_norm_dx_out(
    dxhat: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dres: Tensor | None, dx: Tensor
) -> None:
    """Launcher of `torch.ops.fastnull.layer_norm_dx_out`: all but mean and rstd [outer, inner, D], dense in D."""
    outer, inner, D = x.shape
    check_dtypes(dxhat=dxhat, x=x, dres=dres, dx=dx)
    check_dense(mean=mean, rstd=rstd)
    if not x.numel():
        return
    M = outer * inner
    constants, tile = row_tile(D)
    strides = [s for t in (dxhat, x, dx if dres is None else dres, dx) for s in t.stride()[:2]]
    with on_device_of(x):
        layer_norm_dx_kernel[(triton.cdiv(M, tile.rows),)](
            dxhat, x, mean, rstd, dres, dx, M, inner, D, *strides, **constants, **COMPILE
        )
