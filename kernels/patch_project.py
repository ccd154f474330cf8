"""Projection of image noise in NCHW onto the nullspace of a patch embedding (formulas: ops/patch_project).

Two products with the basis between images and coefficients, both in exact float32 ("ieee"):

    coefficients = v Q            v gathered from the image       [B gh gw, C p^2] x [C p^2, n]
    result = coefficients Q^T     scattered into the image; v minus it if Q spans the row space; plus images

The element in patch row m and column k is at rows_at[m] + columns_at[k], so no product needs an unfolded copy. Only
the coefficients are stored in between: n / (C p^2) of the size of the noise in float32, at most half with the smaller
basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dense, check_dtypes, on_device_of
from fastnull.kernels.tiles import changed
from fastnull.ops.common import check_positive, empty


@dataclass(frozen=True)
class ProjectTile:
    """Tile of patches and of columns of the result, and the step through the inner dimension."""

    patches: int
    columns: int
    step: int
    warps: int


# Untuned on a GPU; chosen by compiling: exact float32 runs on the plain cores, 32 sums per lane, at most 130 registers.
TILES = (ProjectTile(128, 64, 16, 8),)
CANDIDATES = tuple(
    {"patches": m, "columns": n, "step": k, "warps": w}
    for m, n in ((64, 64), (128, 64), (128, 128), (256, 64))
    for k in (16, 32)
    for w in (4, 8)
)


@triton.jit
def _rows_at(row, patches_down, patches_across, P: tl.constexpr, stride_b, stride_h, stride_w):
    """Offset of the patch of each row in an image tensor, 64-bit."""
    row = row.to(tl.int64)
    image, within = row // (patches_down * patches_across), row % (patches_down * patches_across)
    return image * stride_b + (within // patches_across * stride_h + within % patches_across * stride_w) * P


@triton.jit
def _columns_at(column, P: tl.constexpr, stride_c, stride_h, stride_w):
    """Offset of each value in its patch: channel, row, column, as in the embedding's weight."""
    column = column.to(tl.int64)
    return column // (P * P) * stride_c + column // P % P * stride_h + column % P * stride_w


@triton.jit
def coefficients_kernel(
    noise,  # [B, C, H, W], any strides
    basis,  # [K, R] dense float32, K = C p^2
    coefficients,  # [M, R] dense float32, written
    M,
    K,
    R,
    patches_down,
    patches_across,
    noise_b,
    noise_c,
    noise_h,
    noise_w,
    P: tl.constexpr,
    PATCHES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    tiles = tl.cdiv(R, COLUMNS)
    row = tl.program_id(0) // tiles * PATCHES + tl.arange(0, PATCHES)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    valid_row, valid_column = (row < M)[:, None], (column < R)[None, :]
    patch = noise + _rows_at(row, patches_down, patches_across, P, noise_b, noise_h, noise_w)[:, None]
    sums = tl.zeros([PATCHES, COLUMNS], tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        places = patch + _columns_at(k, P, noise_c, noise_h, noise_w)[None, :]
        v = tl.load(places, valid_row & (k < K)[None, :], 0.0).to(tl.float32)
        q = tl.load(basis + k[:, None] * R + column[None, :], (k < K)[:, None] & valid_column, 0.0)
        sums = tl.dot(v, q, sums, input_precision="ieee")
    tl.store(coefficients + row.to(tl.int64)[:, None] * R + column[None, :], sums, valid_row & valid_column)


@triton.jit
def result_kernel(
    coefficients,  # [M, R] dense float32
    basis,  # [K, R] dense float32
    noise,  # [B, C, H, W], any strides: read where COMPLEMENT
    images,  # [B, C, H, W], any strides, or None
    out,  # [B, C, H, W], any strides; may be noise or images
    M,
    K,
    R,
    patches_down,
    patches_across,
    noise_b,
    noise_c,
    noise_h,
    noise_w,
    images_b,
    images_c,
    images_h,
    images_w,
    out_b,
    out_c,
    out_h,
    out_w,
    COMPLEMENT: tl.constexpr,
    P: tl.constexpr,
    PATCHES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    tiles = tl.cdiv(K, COLUMNS)
    row = tl.program_id(0) // tiles * PATCHES + tl.arange(0, PATCHES)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    valid_row, valid_column = (row < M)[:, None], (column < K)[None, :]
    valid = valid_row & valid_column
    source = coefficients + row.to(tl.int64)[:, None] * R
    result = tl.zeros([PATCHES, COLUMNS], tl.float32)
    for start in range(0, R, STEP):
        r = start + tl.arange(0, STEP)
        c = tl.load(source + r[None, :], valid_row & (r < R)[None, :], 0.0)
        q = tl.load(basis + column[None, :] * R + r[:, None], (r < R)[:, None] & valid_column, 0.0)
        result = tl.dot(c, q, result, input_precision="ieee")
    if COMPLEMENT:
        patch = _rows_at(row, patches_down, patches_across, P, noise_b, noise_h, noise_w)
        places = noise + patch[:, None] + _columns_at(column, P, noise_c, noise_h, noise_w)[None, :]
        result = tl.load(places, valid, 0.0).to(tl.float32) - result
    if images is not None:
        patch = _rows_at(row, patches_down, patches_across, P, images_b, images_h, images_w)
        places = images + patch[:, None] + _columns_at(column, P, images_c, images_h, images_w)[None, :]
        result += tl.load(places, valid, 0.0).to(tl.float32)
    patch = _rows_at(row, patches_down, patches_across, P, out_b, out_h, out_w)
    tl.store(out + patch[:, None] + _columns_at(column, P, out_c, out_h, out_w)[None, :], result, valid)


def patch_project_out(
    noise: Tensor, basis: Tensor, patch_size: int, complement: bool, images: Tensor | None, out: Tensor
) -> None:
    """Launcher of `torch.ops.fastnull.patch_project_out`: images of any strides; basis [C p^2, n] dense float32."""
    check_dtypes(noise=noise, images=images, out=out)
    check_dense(basis=basis)
    if basis.dtype != torch.float32:
        raise TypeError(f"basis must be float32; got {basis.dtype}")
    check_positive("patch_size", patch_size)
    if not noise.numel():
        return
    B, _, H, W = noise.shape
    K, R = basis.shape
    down, across = H // patch_size, W // patch_size
    M, tile = B * down * across, changed(TILES[0])
    coefficients = empty((M, R), dtype=torch.float32, device=noise.device)
    sizes = (M, K, R, down, across)
    constants = {"P": patch_size, "PATCHES": tile.patches, "COLUMNS": tile.columns, "STEP": tile.step}
    constants |= {"num_warps": tile.warps, "num_stages": 2}
    strides = [s for t in (noise, out if images is None else images, out) for s in t.stride()]
    row_tiles = triton.cdiv(M, tile.patches)
    with on_device_of(noise):
        if R:  # an empty basis has no coefficients
            coefficients_kernel[(row_tiles * triton.cdiv(R, tile.columns),)](
                noise, basis, coefficients, *sizes, *noise.stride(), **constants, **COMPILE
            )
        result_kernel[(row_tiles * triton.cdiv(K, tile.columns),)](
            coefficients, basis, noise, images, out, *sizes, *strides, COMPLEMENT=complement, **constants, **COMPILE
        )
