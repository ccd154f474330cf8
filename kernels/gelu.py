"""Bias, GELU and its derivative in one pass, and the product with that derivative (formulas: ops/linear_gelu).

Bytes per bfloat16 element: forward 5 (z read, h written, code written), backward 5 (g read and written, code read).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dense, check_dtypes, on_device_of
from fastnull.kernels.tiles import changed
from fastnull.ops.linear_gelu import CODE_OF_ZERO as ZERO
from fastnull.ops.linear_gelu import CODES_PER_UNIT as UNIT

CODES_PER_UNIT = tl.constexpr(UNIT)  # kernels can only read globals of this type
CODE_OF_ZERO = tl.constexpr(ZERO)
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class PointwiseTile:
    """Elements [rows, columns] per program."""

    rows: int
    columns: int
    warps: int


# Untuned. 8 elements per lane are one 16-byte load in bfloat16; with twice as many, 108 registers instead of 45.
TILES = (PointwiseTile(2, 512, 4),)
CANDIDATES = tuple(
    {"rows": r, "columns": c, "warps": w} for r, c in ((1, 512), (1, 1024), (2, 512), (4, 512)) for w in (2, 4, 8)
)


@triton.jit
def erf_gelu(z):
    """gelu(z) and gelu'(z) with one exponential.

    Phi(-t) = exp(-t^2 / 2) R(t) for t >= 0, R a polynomial in 1 / (1 + 0.21 t): our fit, relative error 1.7e-8 on
    [0, 14], the same as csrc/cpu's. 1 + erf would need a second exponential and lose the digits of the negative tail.
    """
    t = tl.abs(z)
    e = tl.exp2(t * t * (-0.5 * LOG2_E))
    u = 1.0 / (1.0 + 0.21 * t)
    r = -0.0716547891 * u + 0.283581465
    r = r * u - 0.330239087
    r = r * u + 0.349384814
    r = r * u - 0.0939139575
    r = r * u + 0.124867812
    r = r * u + 0.0691934824
    r = r * u + 0.0850686580
    r = r * u + 0.0837115869
    tail = e * (r * u)
    cdf = tl.where(z < 0, tail, 1.0 - tail)
    return z * cdf, cdf + z * e * 0.398942280


@triton.jit
def tanh_gelu(z):
    """gelu(z) and gelu'(z) of the tanh form."""
    # At |z| = 10, s is 0 or 1 to within 1e-37; beyond, the cube would overflow and infinity meet zero.
    # `where` and not minimum: NaN must pass.
    above = tl.where(z < -10.0, -10.0, z)
    held = tl.where(z > 10.0, 10.0, above)
    square = held * held
    e = tl.exp2(held * (1.0 + 0.044715 * square) * (-2.0 * 0.797884561 * LOG2_E))
    s = 1.0 / (1.0 + e)
    du = 0.797884561 * (1.0 + 3 * 0.044715 * square)
    # 1 - s = e s: the difference itself would lose its digits where s is near 1.
    return above * s, s + 2.0 * held * s * (e * s) * du


@triton.jit
def encode(derivative, kept):
    """The derivative in the element type of the pointers `kept`: one-byte codes, or unchanged."""
    if kept.dtype.element_ty == tl.uint8:
        derivative = derivative * CODES_PER_UNIT + (CODE_OF_ZERO + 0.5)  # the cast truncates
    return derivative.to(kept.dtype.element_ty)


@triton.jit
def decode(kept):
    """The derivative, decoded from the output of `encode`."""
    if kept.dtype == tl.uint8:
        return (kept.to(tl.float32) - CODE_OF_ZERO) / CODES_PER_UNIT
    return kept.to(tl.float32)


@triton.jit
def gelu_kernel(
    z,  # [outer, inner, D], last dimension dense
    bias,  # [D], or None
    h,  # [outer, inner, D], may be z
    derivative,  # [outer * inner, D] dense, uint8 or float32; or None
    M,
    inner,
    D,
    z_outer,
    z_inner,
    h_outer,
    h_inner,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(D, COLUMNS)
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    valid = (row < M)[:, None] & (column < D)
    outer, within = row // inner, row % inner
    values = tl.load(z + (outer * z_outer + within * z_inner)[:, None] + column, valid, 0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + column, column < D, 0.0).to(tl.float32)
    value, slope = tanh_gelu(values) if TANH else erf_gelu(values)
    tl.store(h + (outer * h_outer + within * h_inner)[:, None] + column, value, valid)
    if derivative is not None:
        kept = derivative + (row * D)[:, None] + column
        tl.store(kept, encode(slope, kept), valid)


@triton.jit
def dgelu_kernel(
    g,  # [outer, inner, D], last dimension dense, overwritten
    derivative,  # [outer * inner, D] dense, uint8 or float32
    M,
    inner,
    D,
    g_outer,
    g_inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(D, COLUMNS)
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    valid = (row < M)[:, None] & (column < D)
    place = g + (row // inner * g_outer + row % inner * g_inner)[:, None] + column
    slope = decode(tl.load(derivative + (row * D)[:, None] + column, valid, 0))
    tl.store(place, tl.load(place, valid, 0.0).to(tl.float32) * slope, valid)


def check_derivative(derivative: Tensor, shape: tuple[int, ...]) -> None:
    """The derivative is dense, of the activations' size, and of a dtype the kernels keep.

    Raises:
        TypeError: neither uint8 nor float32.
        ValueError: not dense or of another size.
    """
    if derivative.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"derivative must be uint8 or float32; got {derivative.dtype}")
    check_dense(derivative=derivative)
    if derivative.numel() != shape[0] * shape[1] * shape[-1]:
        raise ValueError(f"derivative must have the size of {list(shape)}; got {list(derivative.shape)}")


def gelu_out(z: Tensor, bias: Tensor | None, tanh: bool, h: Tensor, derivative: Tensor | None) -> None:
    """Launcher of `torch.ops.fastnull.gelu_out`: z, h [outer, inner, D], dense in D; derivative dense, of that size."""
    outer, inner, D = z.shape
    check_dtypes(z=z, h=h)
    if derivative is not None:
        check_derivative(derivative, z.shape)
    if not z.numel():
        return
    M, tile = outer * inner, changed(TILES[0])
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(D, tile.columns),)
    with on_device_of(z):
        gelu_kernel[grid](
            z, bias, h, derivative, M, inner, D, *z.stride()[:2], *h.stride()[:2],
            TANH=tanh, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, **COMPILE,
        )  # fmt: skip


def dgelu_(g: Tensor, derivative: Tensor) -> None:
    """Launcher of `torch.ops.fastnull.dgelu_`: g [outer, inner, D], dense in D; derivative dense, of that size."""
    outer, inner, D = g.shape
    check_dtypes(g=g)
    check_derivative(derivative, g.shape)
    if not g.numel():
        return
    M, tile = outer * inner, changed(TILES[0])
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(D, tile.columns),)
    with on_device_of(g):
        dgelu_kernel[grid](
            g, derivative, M, inner, D, *g.stride()[:2],
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, **COMPILE,
        )  # fmt: skip
