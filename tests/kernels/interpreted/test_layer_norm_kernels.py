"""LayerNorm kernels against float64, through the public functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.ops.layer_norm import layer_norm_ref
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, nan, randn

EPS = 1e-6
# 10 and 9 rows leave a tail in tiles of 4 and 2. D: 192 = ViT-Ti, padded to 256; 768 = ViT-B, padded to 1024, next
# tile; 7 = under the least width; 1280 = ViT-H, third tile, one row. Dropped: 384 and 1024 (as 192 and 768).
SHAPES = [(2, 5, 192), (9, 768), (3, 7), (1, 3, 1280)]


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_statistics(shape: tuple[int, ...], dtype: torch.dtype, parameters: bool) -> None:
    """With weight, bias and shift, and without."""
    x = randn(shape, dtype, 0)
    x[..., 0] += 30
    given = [randn(shape[-1:], torch.float32, s) if parameters else None for s in (1, 2, 11)]
    weight, bias, shift = given
    y64, mean64, rstd64 = layer_norm_ref(x.double(), *(None if p is None else p.double() for p in (weight, bias)), EPS,
                                         shift)  # fmt: skip
    with testing.poisoned():
        y, mean, rstd = ops.layer_norm_stats(x, weight, bias, EPS, shift=shift)
    cast = [None if p is None else p.to(dtype) for p in (weight, bias)]
    wide = x.float() if shift is None else x.float() + shift
    testing.assert_within_budget(y, y64, F.layer_norm(wide.to(dtype), shape[-1:], *cast, EPS), "y")
    assert y.dtype == dtype
    testing.assert_within_budget(mean, mean64, wide.mean(-1), "mean")
    testing.assert_within_budget(rstd, rstd64, (wide.var(-1, correction=0) + EPS).rsqrt(), "rstd")


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient(shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> None:
    x, dxhat, dres = (randn(shape, dtype, s) for s in (3, 4, 5))

    def gradient(dt: torch.dtype) -> torch.Tensor:
        leaf = x.to(dt).clone().requires_grad_()
        (dx,) = torch.autograd.grad(F.layer_norm(leaf, shape[-1:], eps=EPS), leaf, dxhat.to(dt))
        return dx + dres.to(dt) if residual else dx

    with testing.poisoned():
        xhat, mean, rstd = ops.layer_norm_stats(x, eps=EPS)
        for kept in ((x, mean), (xhat, None)):
            dx = ops.layer_norm_dx(dxhat, *kept, rstd, dres if residual else None)
            testing.assert_gradient_close(dx, gradient(torch.float64), gradient(dtype), "dx")


def test_in_place_and_given_outputs() -> None:
    """dx over dres, dx over dxhat, y over x: what the encoder does with its buffers."""
    x, dxhat, dres = (randn((2, 9, 40), torch.float32, s) for s in (6, 7, 8))
    _, mean, rstd = ops.layer_norm_stats(x, eps=EPS)
    expected = ops.layer_norm_dx(dxhat, x, mean, rstd, dres)
    assert ops.layer_norm_dx(dxhat, x, mean, rstd, dres.clone(), out=dres) is dres
    assert dres.equal(expected)
    without = ops.layer_norm_dx(dxhat, x, mean, rstd)
    assert ops.layer_norm_dx(dxhat, x, mean, rstd, out=dxhat).equal(without)
    y = ops.layer_norm(x)
    ops.layer_norm_stats(x, eps=EPS, out=(x, None, nan(2, 9)))
    assert x.equal(y)


def test_nothing_is_written_beside_the_output() -> None:
    whole = nan(4, 5, 64)
    x = randn((2, 3, 40), torch.float32, 9)
    ops.layer_norm_stats(x, out=(whole[1:3, 1:4, 8:48], nan(2, 3), nan(2, 3)))
    assert int(whole.isfinite().sum()) == x.numel()


def test_nan_stays_in_its_row() -> None:
    x = randn((2, 3, 37), torch.float32, 10)
    x[1, 1, 36] = float("nan")
    y = ops.layer_norm(x)
    assert y[1, 1].isnan().all()
    assert int(y.isnan().sum()) == 37


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    y, mean, rstd = ops.layer_norm_stats(x)
    assert y.shape == ops.layer_norm_dx(x, x, mean, rstd, x).shape == shape


def test_float64_is_refused_by_the_launcher() -> None:
    """The public function never sends it there; a direct call must not lose digits silently."""
    x, stat = torch.zeros(1, 2, 8, dtype=torch.float64, device=DEVICE), torch.zeros(2, device=DEVICE)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        torch.ops.fastnull.layer_norm_out(x, None, None, None, EPS, x, stat, stat.clone())
