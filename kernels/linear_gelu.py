"""The two products of an MLP with GELU in their epilogues (formulas: ops/linear_gelu).

    h = gelu(x W^T + b), and gelu'      z = x W^T + b is never written, which saves two of three passes over memory
    dz = (dy W) * gelu'                 the same for dy W

For bfloat16 and float16. It is unmeasured whether this is faster than the library's product followed by
kernels/gelu.py; the library is hard to beat at these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dense, on_device_of
from fastnull.kernels.gelu import check_derivative, decode, encode, erf_gelu, tanh_gelu
from fastnull.kernels.tiles import changed


@dataclass(frozen=True)
class GemmTile:
    """Tile [m, n] of the output, step k through the inner dimension, and number of row tiles per band."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    band: int


# Untuned on a GPU; chosen by compiling: 128x256 with 8 warps and 128x128 with 4 spill some 750 bytes in the epilogue.
TILES = (GemmTile(128, 128, 64, warps=8, stages=3, band=8),)
CANDIDATES = tuple(
    {"m": m, "n": n, "k": k, "warps": 8, "stages": stages}
    for m, n, k in ((128, 128, 64), (128, 256, 64), (256, 128, 64), (64, 256, 64), (128, 128, 32))
    for stages in (3, 4)
)


@triton.jit
def output_tile(M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """Rows [TILE_M] and columns [TILE_N] of this program: column by column within a band of row tiles.

    Programs that run at the same time then share rows of A and columns of B in the L2 cache.
    """
    row_tiles, column_tiles = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    band = tl.program_id(0) // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * column_tiles)
    row = (band * BAND + within % height) * TILE_M + tl.arange(0, TILE_M)
    return row, within // height * TILE_N + tl.arange(0, TILE_N)


@triton.jit
def product(
    a, b, row, column, M, N, K, a_row, b_k, b_column, TILE_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr
):
    """float32 [rows, columns] of A [M, K] (dense in K) times B [K, N] (any strides)."""
    k = tl.arange(0, TILE_K)
    # Rows beyond the last one read it again, and the result is not stored. For columns, that would hide from the
    # compiler that neighbours in memory are read: B would be loaded value by value, without a pipeline.
    a_pointers = a + (tl.minimum(row, M - 1).to(tl.int64) * a_row)[:, None] + k[None, :]
    b_pointers = b + k.to(tl.int64)[:, None] * b_k + column.to(tl.int64)[None, :] * b_column
    valid = (column < N)[None, :]
    sums = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, K, TILE_K):
        if WHOLE_K:
            a_tile = tl.load(a_pointers)
            b_tile = tl.load(b_pointers) if WHOLE_N else tl.load(b_pointers, valid, 0.0)
        else:
            left = K - start
            a_tile = tl.load(a_pointers, (k < left)[None, :], 0.0)
            b_tile = tl.load(b_pointers, (k < left)[:, None] & valid, 0.0)
        sums = tl.dot(a_tile, b_tile, sums)
        a_pointers += TILE_K
        b_pointers += TILE_K * b_k
    return sums


@triton.jit
def linear_gelu_kernel(
    x,  # [M, K], dense in K
    weight,  # W^T as [K, N], any strides
    bias,  # [N], or None
    h,  # [M, N] dense
    derivative,  # [M, N] dense, uint8 or float32; or None
    M,
    N,
    K,
    x_row,
    weight_k,
    weight_column,
    TANH: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
):
    row, column = output_tile(M, N, TILE_M, TILE_N, BAND)
    z = product(x, weight, row, column, M, N, K, x_row, weight_k, weight_column, TILE_K, WHOLE_K, WHOLE_N)
    if bias is not None:
        z += tl.load(bias + column, column < N, 0.0).to(tl.float32)[None, :]
    value, slope = tanh_gelu(z) if TANH else erf_gelu(z)
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    valid = (row < M)[:, None] & (column < N)[None, :]
    tl.store(h + place, value, valid)
    if derivative is not None:
        tl.store(derivative + place, encode(slope, derivative), valid)


@triton.jit
def linear_dgelu_kernel(
    dy,  # [M, K], dense in K
    weight,  # [K, N], any strides
    derivative,  # [M, N] dense, uint8 or float32
    dz,  # [M, N] dense
    M,
    N,
    K,
    dy_row,
    weight_k,
    weight_column,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
):
    row, column = output_tile(M, N, TILE_M, TILE_N, BAND)
    g = product(dy, weight, row, column, M, N, K, dy_row, weight_k, weight_column, TILE_K, WHOLE_K, WHOLE_N)
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    valid = (row < M)[:, None] & (column < N)[None, :]
    tl.store(dz + place, g * decode(tl.load(derivative + place, valid, 0)), valid)


def _check(x: Tensor, weight: Tensor, out: Tensor, derivative: Tensor | None) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16) or x.dtype != weight.dtype or x.dtype != out.dtype:
        raise TypeError(
            "x, weight and the output must be all bfloat16 or all float16 for the fused kernels; "
            f"got {x.dtype}, {weight.dtype}, {out.dtype}"
        )
    if x.ndim != 2 or weight.shape[0] != x.shape[1] or out.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(f"shapes do not fit: {list(x.shape)} @ {list(weight.shape)} -> {list(out.shape)}")
    if x.stride(1) != 1:
        raise ValueError(f"the last dimension of x must be dense; its strides are {x.stride()}")
    check_dense(out=out)
    if derivative is not None:
        check_derivative(derivative, (1, *out.shape))


def _tile(M: int, N: int, K: int) -> tuple[tuple[int], dict[str, int | bool]]:
    tile = changed(TILES[0])
    grid = (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    sizes = {"TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": tile.k, "BAND": tile.band}
    whole = {"WHOLE_K": K % tile.k == 0, "WHOLE_N": N % tile.n == 0}
    return grid, {**sizes, **whole, "num_warps": tile.warps, "num_stages": tile.stages}


def linear_gelu_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, h: Tensor, derivative: Tensor | None
) -> None:
    """Launcher of `torch.ops.fastnull.linear_gelu_out`: x [M, K]; weight [N, K]; h, derivative [M, N] dense."""
    _check(x, weight.t(), h, derivative)
    if not h.numel():
        return
    (M, K), N = x.shape, weight.shape[0]
    grid, constants = _tile(M, N, K)
    strides = (x.stride(0), weight.stride(1), weight.stride(0))
    with on_device_of(x):
        linear_gelu_kernel[grid](x, weight, bias, h, derivative, M, N, K, *strides, TANH=tanh, **constants, **COMPILE)


def linear_dgelu_out(dy: Tensor, weight: Tensor, derivative: Tensor, dz: Tensor) -> None:
    """Launcher of `torch.ops.fastnull.linear_dgelu_out`: dy [M, K]; weight [K, N]; derivative, dz [M, N] dense."""
    _check(dy, weight, dz, derivative)
    if not dz.numel():
        return
    (M, K), N = dy.shape, weight.shape[1]
    grid, constants = _tile(M, N, K)
    with on_device_of(dy):
        linear_dgelu_kernel[grid](
            dy, weight, derivative, dz, M, N, K, dy.stride(0), *weight.stride(), **constants, **COMPILE
        )
