"""LayerNorm kernels against float64, through the public functions."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, nan, randn
from tests.ops import checks
from tests.ops.checks import EPS

# 10 and 9 rows leave a tail in tiles of 4 and 2. D: 192 = ViT-Ti, padded to 256; 768 = ViT-B, padded to 1024, next
# tile; 7 = under the least width; 1280 = ViT-H, third tile, one row. Dropped: 384 and 1024 (as 192 and 768).
SHAPES = [(2, 5, 192), (9, 768), (3, 7), (1, 3, 1280)]


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_statistics(shape: tuple[int, ...], dtype: torch.dtype, parameters: bool) -> None:
    """With weight, bias and shift, and without."""
    given = (randn(shape[-1:], torch.float32, s) if parameters else None for s in (1, 2, 11))
    checks.layer_norm(randn(shape, dtype, 0), *given)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient(shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> None:
    x, dxhat, dres = (randn(shape, dtype, s) for s in (3, 4, 5))
    checks.layer_norm_gradient(x, dxhat, dres if residual else None)


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
    checks.layer_norm_of_nan(randn((2, 3, 37), torch.float32, 10))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    checks.layer_norm_of_nothing(torch.empty(shape, device=DEVICE))


def test_float64_is_refused_by_the_launcher() -> None:
    """The public function does not call it; a direct call must not lose precision silently."""
    x, stat = torch.zeros(1, 2, 8, dtype=torch.float64, device=DEVICE), torch.zeros(2, device=DEVICE)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        torch.ops.fastnull.layer_norm_out(x, None, None, None, EPS, x, stat, stat.clone())
