"""Bias, GELU and kept derivative, alone and in the epilogue of a product, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.ops.linear_gelu import decode_derivative
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, nan, randn
from tests.ops import checks

KINDS = ["none", "tanh"]
# 600 = a tile of 512 and a tail; 5 = less than a tile; 9 and 6 rows = tails of the four rows of a tile.
SHAPES = [(2, 3, 600), (9, 5)]


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_derivative(shape: tuple[int, ...], dtype: torch.dtype, kind: str, coded: bool) -> None:
    z, bias = 2 * randn(shape, dtype, 0), randn(shape[-1:], dtype, 1)
    derivative = nan(*shape, dtype=torch.uint8 if coded else torch.float32)
    h = randn(shape, dtype, 2)  # strided
    checks.gelu(h.copy_(z), bias, kind, derivative)
    g = randn(shape, dtype, 3)
    slope = decode_derivative(derivative)
    expected, baseline = g.double() * slope.double(), g * slope.to(dtype)
    assert ops.dgelu_(g, derivative) is g
    testing.assert_gradient_close(g, expected, baseline, "g * gelu'")


def test_bias_of_any_dtype() -> None:
    """On a GPU the public function passes the bias on unchanged."""
    z, bias = randn((1, 3, 40), torch.float16, 3), randn((40,), torch.float16, 4).contiguous()
    results = [nan(1, 3, 40, dtype=torch.float16) for _ in range(2)]
    for given, h in zip((bias, bias.float()), results, strict=True):
        torch.ops.fastnull.gelu_out(z, given, False, h, None)
    assert results[0].equal(results[1])


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", KINDS)
def test_far_tails_are_exact(kind: str) -> None:
    checks.gelu_tails(kind, DEVICE, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_propagates(kind: str) -> None:
    checks.gelu_of_nan(torch.zeros(2, 19, device=DEVICE), kind, nan(2, 19))


def test_empty() -> None:
    z = torch.empty(0, 4, device=DEVICE)
    assert ops.dgelu_(ops.gelu_(z, derivative=z.clone()), z.clone()).shape == (0, 4)


# M, N, K: 130 and 140 = a tile of 128 and a tail; 96 = a step of 64 and a tail; 64 = one whole step, no mask; 1030 rows
# = nine row tiles, more than a band of eight. Dropped: the sizes of ViTs (as the second, but slow here).
PRODUCTS = [(130, 140, 96), (3, 128, 64), (1030, 130, 64)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", PRODUCTS)
def test_fused_products(sizes: tuple[int, int, int], transposed: bool, dtype: torch.dtype, kind: str) -> None:
    """x and dy are strided; the weights dense as in nn.Linear, or both transposed in memory."""
    M, N, K = sizes
    x, dy, bias = randn((M, K), dtype, 4), randn((M, K), dtype, 5), randn((N,), torch.float32, 6).contiguous()
    w1, w2 = (randn(shape, dtype, 7).contiguous() / K**0.5 for shape in ((N, K), (K, N)))
    if transposed:
        w1, w2 = w1.t().contiguous().t(), w2.t().contiguous().t()
    h, dz, derivative = nan(M, N, dtype=dtype), nan(M, N, dtype=dtype), nan(M, N, dtype=torch.uint8)
    torch.ops.fastnull.linear_gelu_out(x, w1, bias, kind == "tanh", h, derivative)
    z64 = F.linear(x.double(), w1.double(), bias.double())
    z = F.linear(x, w1, bias.to(dtype))
    testing.assert_within_budget(h, F.gelu(z64, approximate=kind), F.gelu(z, approximate=kind), "h")
    slope64 = checks.gelu_slope(z64, kind)
    checks.gelu_derivative(derivative, slope64, slope64)

    torch.ops.fastnull.linear_dgelu_out(dy, w2, derivative, dz)
    slope = decode_derivative(derivative)
    testing.assert_gradient_close(dz, dy.double() @ w2.double() * slope.double(), dy @ w2 * slope.to(dtype), "dz")


def test_fused_products_refuse_what_they_cannot_do() -> None:
    x, w, h = (nan(*shape, dtype=torch.float16) for shape in ((4, 8), (6, 8), (4, 6)))
    with pytest.raises(TypeError, match="must be all bfloat16 or all float16"):
        torch.ops.fastnull.linear_gelu_out(x.float(), w, None, False, h, None)
    with pytest.raises(ValueError, match="shapes do not fit"):
        torch.ops.fastnull.linear_gelu_out(x, w[:, :7], None, False, h, None)
    with pytest.raises(ValueError, match="out must be dense"):
        torch.ops.fastnull.linear_gelu_out(x, w, None, False, nan(6, 4, dtype=torch.float16).t(), None)
