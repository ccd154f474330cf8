"""LayerNorm and its fused input gradient, every CPU backend against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.ops.layer_norm import layer_norm_dx_ref, layer_norm_ref
from tests.ops import checks
from tests.ops.checks import EPS

DTYPES = [torch.float32, torch.bfloat16]
# D: 768 = ViT-B, whole vectors at every level; 197 = a tail at every level and more than one unrolled stretch; 5 = less
# than a vector of AVX2; 1 = degenerate (variance 0). Dropped: 192, 384, 1024 (as 768).
# Leading dimensions: [B, N] as activations are; a single row; none at all. Empty: see test_empty.
SHAPES = [(3, 50, 768), (2, 7, 197), (4, 5), (5,), (2, 3, 1), (2, 2, 3, 33)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(backend: str, shape: tuple[int, ...], dtype: torch.dtype, shifted: bool, affine: bool) -> None:
    g = generator()
    x = testing.randn(shape, dtype, g)
    weight, bias = (torch.randn(shape[-1], generator=g) for _ in range(2)) if affine else (None, None)
    checks.layer_norm(x, weight, bias, torch.randn(shape[-1], generator=g) if shifted else None)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient(backend: str, shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> None:
    g = generator(1)
    x, dxhat, dres = (testing.randn(shape, dtype, g) for _ in range(3))
    checks.layer_norm_gradient(x, dxhat, dres if residual else None)


def test_autograd_of_all_inputs(backend: str) -> None:
    g = generator(2)
    x, dy = (testing.randn((3, 5, 33), torch.float32, g) for _ in range(2))
    inputs = [x, torch.randn(33, generator=g), torch.randn(33, generator=g)]
    checks.gradients(lambda *x: ops.layer_norm(*x, EPS), lambda x, *p: F.layer_norm(x, (33,), *p, EPS), inputs, dy)


def test_in_place_and_given_outputs(backend: str) -> None:
    """dx over dres, y over x: what the encoder does with its buffers."""
    g = generator(3)
    x, dxhat, dres = (testing.randn((2, 9, 40), torch.float32, g) for _ in range(3))
    expected, mean64, rstd64 = layer_norm_ref(x, None, None, EPS)
    expected_dx = layer_norm_dx_ref(dxhat, x, mean64, rstd64, dres)
    assert ops.layer_norm_dx(dxhat, x, mean64, rstd64, dres, out=dres) is dres
    torch.testing.assert_close(dres, expected_dx, rtol=1e-5, atol=1e-5)
    rstd = torch.empty(2, 9)
    ops.layer_norm_stats(x, eps=EPS, out=(x, None, rstd))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rstd, rstd64)


def test_properties(backend: str) -> None:
    """Shift invariance, zero mean and unit variance of a row, gradient orthogonal to 1 and to xhat."""
    x, dxhat = (testing.randn((4, 6, 96), torch.float32, generator(4)) for _ in range(2))
    y, mean, rstd = ops.layer_norm_stats(x, eps=0.0)
    shifted, _, _ = ops.layer_norm_stats(x + 3, eps=0.0)
    dx = ops.layer_norm_dx(dxhat, x, mean, rstd)
    torch.testing.assert_close(shifted, y, rtol=0, atol=2e-6)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4, 6), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(dx.sum(-1), torch.zeros(4, 6), rtol=0, atol=1e-4)
    torch.testing.assert_close((dx * y).sum(-1), torch.zeros(4, 6), rtol=0, atol=1e-4)


def test_nan_stays_in_its_row(backend: str) -> None:
    checks.layer_norm_of_nan(testing.randn((2, 3, 37), torch.float32, generator(5)))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    checks.layer_norm_of_nothing(torch.empty(shape))


def test_transposed_input_is_copied_and_right() -> None:
    """The last dimension is not dense: the one case that copies."""
    x = torch.randn(8, 5, 3, generator=generator(6)).transpose(1, 2)
    torch.testing.assert_close(ops.layer_norm(x), F.layer_norm(x, (5,), eps=EPS), rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \[8\]"):
        ops.layer_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"shift must have shape \[8\]"):
        ops.layer_norm_stats(x, shift=torch.ones(2, 8))
    _, mean, rstd = ops.layer_norm_stats(x)
    with pytest.raises(ValueError, match="dxhat must have the shape of x"):
        ops.layer_norm_dx(torch.zeros(2, 7), x, mean, rstd)
    with pytest.raises(ValueError, match="last dimension of out"):
        ops.layer_norm_dx(x, x, mean, rstd, out=torch.zeros(8, 2).t())


def test_opcheck(backend: str) -> None:
    x = testing.randn((2, 3, 8), torch.float32, generator(7))
    mean, rstd = torch.zeros(2, 3), torch.ones(2, 3)
    one = torch.ones(8)
    testing.opcheck("layer_norm_out", (x, one, None, None, EPS, torch.empty(2, 3, 8), mean, rstd))
    testing.opcheck("layer_norm_out", (x, None, one, one, EPS, torch.empty(2, 3, 8), None, rstd))
    testing.opcheck("layer_norm_dx_out", (x, x, mean, rstd, None, torch.empty(2, 3, 8)))
    testing.opcheck("layer_norm_dx_out", (x, x, None, rstd, x.clone(), torch.empty(2, 3, 8)))
