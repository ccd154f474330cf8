"""LayerNorm and its fused input gradient, every CPU backend against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.ops.layer_norm import layer_norm_dx_ref, layer_norm_ref

BACKENDS = testing.cpu_backends()
DTYPES = [torch.float32, torch.bfloat16]
# D: 768 = ViT-B, whole vectors at every level; 197 = a tail at every level and more than one unrolled stretch; 5 = less
# than a vector of AVX2; 1 = degenerate (variance 0). Dropped: 192, 384, 1024 (as 768).
# Leading dimensions: [B, N] as activations are; a single row; none at all. Empty: see test_empty.
SHAPES = [(3, 50, 768), (2, 7, 197), (4, 5), (5,), (2, 3, 1), (2, 2, 3, 33)]
EPS = 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend: str, shape: tuple[int, ...], dtype: torch.dtype, shifted: bool, affine: bool) -> None:
    g = generator()
    # An offset of 30 standard deviations in one channel: E[x^2] - mean^2 in float32 would lose its digits.
    x = testing.randn(shape, dtype, g)
    x[..., 0] += 30
    weight, bias = (torch.randn(shape[-1], generator=g) for _ in range(2)) if affine else (None, None)
    shift = torch.randn(shape[-1], generator=g) if shifted else None
    wide, wide64 = (x.to(dt) if shift is None else x.to(dt) + shift for dt in (torch.float32, torch.float64))
    y64, mean64, rstd64 = layer_norm_ref(wide64, *(None if p is None else p.double() for p in (weight, bias)), eps=EPS)
    with testing.use_backend(backend), testing.poisoned():
        y, mean, rstd = ops.layer_norm_stats(x, weight, bias, EPS, shift=shift)
    cast = [None if p is None else p.to(dtype) for p in (weight, bias)]
    testing.assert_within_budget(y, y64, F.layer_norm(wide.to(dtype), shape[-1:], *cast, EPS), "y")
    assert y.dtype == dtype
    assert mean.dtype == rstd.dtype == torch.float32
    testing.assert_within_budget(mean, mean64, wide.mean(-1), "mean")
    testing.assert_within_budget(rstd, rstd64, (wide.var(-1, correction=0) + EPS).rsqrt(), "rstd")


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_input_gradient(backend: str, shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> None:
    g = generator(1)
    x, dxhat, dres = (testing.randn(shape, dtype, g) for _ in range(3))
    x64 = x.double().requires_grad_()
    (reference,) = torch.autograd.grad(F.layer_norm(x64, shape[-1:], eps=EPS), x64, dxhat.double())
    x_same = x.clone().requires_grad_()
    (baseline,) = torch.autograd.grad(F.layer_norm(x_same, shape[-1:], eps=EPS), x_same, dxhat)
    if residual:
        reference, baseline = reference + dres.double(), baseline + dres
    with testing.use_backend(backend), testing.poisoned():
        xhat, mean, rstd = ops.layer_norm_stats(x, eps=EPS)
        dx = ops.layer_norm_dx(dxhat, x, mean, rstd, dres if residual else None)
        of_normalised = ops.layer_norm_dx(dxhat, xhat, None, rstd, dres if residual else None)
    testing.assert_gradient_close(dx, reference, baseline, "dx")
    testing.assert_gradient_close(of_normalised, reference, baseline, "dx from the normalised row")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_of_all_inputs(backend: str) -> None:
    g = generator(2)
    x, dy = (testing.randn((3, 5, 33), torch.float32, g) for _ in range(2))
    inputs = [x, torch.randn(33, generator=g), torch.randn(33, generator=g)]
    leaves = [t.double().requires_grad_() for t in inputs]
    reference = torch.autograd.grad(F.layer_norm(leaves[0], (33,), *leaves[1:], EPS), leaves, dy.double())
    leaves = [t.clone().requires_grad_() for t in inputs]
    baseline = torch.autograd.grad(F.layer_norm(leaves[0], (33,), *leaves[1:], EPS), leaves, dy)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with testing.use_backend(backend):
        actual = torch.autograd.grad(ops.layer_norm(*leaves, EPS), leaves, dy)
    for name, a, r, b in zip(("dx", "dweight", "dbias"), actual, reference, baseline, strict=True):
        testing.assert_gradient_close(a, r, b, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_and_given_outputs(backend: str) -> None:
    """dx over dres, y over x: what the encoder does with its buffers."""
    g = generator(3)
    x, dxhat, dres = (testing.randn((2, 9, 40), torch.float32, g) for _ in range(3))
    expected, mean64, rstd64 = layer_norm_ref(x, None, None, EPS)
    with testing.use_backend(backend):
        expected_dx = layer_norm_dx_ref(dxhat, x, mean64, rstd64, dres)
        assert ops.layer_norm_dx(dxhat, x, mean64, rstd64, dres, out=dres) is dres
        torch.testing.assert_close(dres, expected_dx, rtol=1e-5, atol=1e-5)
        mean, rstd = torch.empty(2, 9), torch.empty(2, 9)
        ops.layer_norm_stats(x.clone(), eps=EPS, out=(x.clone(), None, rstd))
        torch.testing.assert_close(rstd, rstd64)
        ops.layer_norm_stats(x, eps=EPS, out=(x, mean, rstd))
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_properties(backend: str) -> None:
    """Shift invariance, zero mean and unit variance of a row, gradient orthogonal to 1 and to xhat."""
    x, dxhat = (testing.randn((4, 6, 96), torch.float32, generator(4)) for _ in range(2))
    with testing.use_backend(backend):
        y, mean, rstd = ops.layer_norm_stats(x, eps=0.0)
        shifted, _, _ = ops.layer_norm_stats(x + 3, eps=0.0)
        dx = ops.layer_norm_dx(dxhat, x, mean, rstd)
    torch.testing.assert_close(shifted, y, rtol=0, atol=2e-6)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4, 6), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(dx.sum(-1), torch.zeros(4, 6), rtol=0, atol=1e-4)
    torch.testing.assert_close((dx * y).sum(-1), torch.zeros(4, 6), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend: str) -> None:
    x = testing.randn((2, 3, 37), torch.float32, generator(5))
    x[1, 1, 36] = float("nan")
    with testing.use_backend(backend):
        y = ops.layer_norm(x)
    assert y[1, 1].isnan().all()
    assert int(y.isnan().sum()) == 37


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    with testing.use_backend(backend):
        y, mean, rstd = ops.layer_norm_stats(x)
        assert y.shape == ops.layer_norm_dx(x, x, mean, rstd, x).shape == shape


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x = testing.randn((2, 3, 8), torch.float32, generator(7))
    mean, rstd = torch.zeros(2, 3), torch.ones(2, 3)
    with testing.use_backend(backend):
        one = torch.ones(8)
        testing.opcheck("layer_norm_out", (x, one, None, None, EPS, torch.empty(2, 3, 8), mean, rstd))
        testing.opcheck("layer_norm_out", (x, None, one, one, EPS, torch.empty(2, 3, 8), None, rstd))
        testing.opcheck("layer_norm_dx_out", (x, x, mean, rstd, None, torch.empty(2, 3, 8)))
        testing.opcheck("layer_norm_dx_out", (x, x, None, rstd, x.clone(), torch.empty(2, 3, 8)))
