"""The input gradient of a linear with the backward of the LayerNorm before it in its epilogue
(formulas: ops/linear_layer_norm_dx).

    dx = dres + r (dz W - c1 / D - xhat c2 / D)        dz W is never written: 2 T less than with a separate pass

bfloat16 and float16. Whether it beats the library's product followed by kernels/layer_norm.py is unmeasured; nothing
uses it by default.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dense, on_device_of
from fastnull.kernels.linear_gelu import GemmTile, output_tile, product
from fastnull.kernels.tiles import table

# Untuned on a GPU; chosen by compiling without spills.
TILES = table("linear_dx.TILES", (GemmTile(128, 128, 64, warps=8, stages=3, band=8),))
CANDIDATES = tuple(
    {"m": m, "n": n, "k": k, "warps": 8, "stages": stages}
    for m, n, k in ((128, 128, 64), (64, 128, 64), (128, 64, 64), (64, 256, 64), (128, 128, 32))
    for stages in (3, 4)
)


@triton.jit
def linear_layer_norm_dx_kernel(
    dz,  # [M, K], dense in K
    weight,  # [K, N], any strides
    x,  # [M, N] dense
    mean,  # [M] float32
    rstd,  # [M] float32
    c1,  # [M] float32
    c2,  # [M] float32
    dres,  # [M, N] dense, or None
    dx,  # [M, N] dense, may be dres
    M,
    N,
    K,
    dz_row,
    weight_k,
    weight_column,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, column = output_tile(M, N, TILE_M, TILE_N, BAND)
    dxhat = product(dz, weight, row, column, M, N, K, dz_row, weight_k, weight_column, TILE_K, WHOLE)
    valid_row = row < M
    r, middle = tl.load(rstd + row, valid_row, 0.0), tl.load(mean + row, valid_row, 0.0)
    first, second = tl.load(c1 + row, valid_row, 0.0) / N, tl.load(c2 + row, valid_row, 0.0) / N
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    valid = valid_row[:, None] & (column < N)[None, :]
    xhat = (tl.load(x + place, valid, 0.0).to(tl.float32) - middle[:, None]) * r[:, None]
    result = r[:, None] * (dxhat - first[:, None] - xhat * second[:, None])
    if dres is not None:
        result += tl.load(dres + place, valid, 0.0).to(tl.float32)
    tl.store(dx + place, result, valid)


def linear_layer_norm_dx_out(
    dz: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    c1: Tensor,
    c2: Tensor,
    dres: Tensor | None,
    dx: Tensor,
) -> None:
    """Launcher of `torch.ops.fastnull.linear_layer_norm_dx_out`: dz [M, K]; weight [K, N]; x, dres, dx [M, N] dense."""
    (M, K), N, tile = dz.shape, weight.shape[1], TILES[0]
    kinds = {t.dtype for t in (dz, weight, x, dx, *(() if dres is None else (dres,)))}
    if kinds not in ({torch.bfloat16}, {torch.float16}):
        raise TypeError(
            f"dz, weight, x, dres and dx must be all bfloat16 or all float16 for the fused kernel; got "
            f"{', '.join(sorted(map(str, kinds)))}"
        )
    if weight.shape[0] != K or x.shape != (M, N) or dx.shape != x.shape:
        raise ValueError(f"shapes do not fit: {list(dz.shape)} @ {list(weight.shape)} -> {list(x.shape)}")
    if dz.stride(1) != 1:
        raise ValueError(f"the last dimension of dz must be dense; its strides are {dz.stride()}")
    check_dense(x=x, mean=mean, rstd=rstd, c1=c1, c2=c2, dres=dres, dx=dx)
    if not dx.numel():
        return
    with on_device_of(dz):
        linear_layer_norm_dx_kernel[(triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)](
            dz, weight, x, mean, rstd, c1, c2, dres, dx, M, N, K, dz.stride(0), *weight.stride(),
            TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, BAND=tile.band, WHOLE=K % tile.k == 0,
            num_warps=tile.warps, num_stages=tile.stages, **COMPILE,
        )  # fmt: skip
