"""GELU with bias, its kept derivative, and the linears around it; every CPU backend against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from fastnull.ops.linear_gelu import decode_derivative, encode_derivative, gelu_ref
from tests.ops import checks

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["none", "tanh"]
# 3072 = ViT-B's hidden width; 197 = a tail at every level; 5 = less than a vector.
SHAPES = [(2, 50, 3072), (3, 197), (4, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_derivative(backend: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    z, bias = 2 * testing.randn(shape, dtype, g), torch.randn(shape[-1], generator=g).to(dtype)
    derivative = torch.full(shape, float("nan")) if dtype == torch.float32 else torch.zeros(shape, dtype=torch.uint8)
    checks.gelu(z, bias, kind, derivative)


@pytest.mark.parametrize("kind", KINDS)
def test_far_tails_are_exact(backend: str, kind: str) -> None:
    checks.gelu_tails(kind, "cpu", torch.bfloat16)


def test_code_round_trip() -> None:
    """Every code decodes to what encodes to it; 0 and 1 are exact; the range of gelu' fits, for erf and tanh."""
    codes = torch.arange(256, dtype=torch.uint8)
    assert encode_derivative(decode_derivative(codes)).equal(codes)
    assert decode_derivative(encode_derivative(torch.tensor([0.0, 1.0]))).equal(torch.tensor([0.0, 1.0]))
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    for kind in KINDS:
        derivative = gelu_ref(z, None, kind)[1]
        low, high = decode_derivative(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
        assert low < derivative.min()
        assert derivative.max() < high


def mlp(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, kind: str) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=kind), w2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_input_gradient(backend: str, dtype: torch.dtype, kind: str) -> None:
    """linear_gelu_derivative and linear_dgelu, as the encoder chains them."""
    g = torch.Generator().manual_seed(1)
    x, dy = testing.randn((2, 9, 24), dtype, g), testing.randn((2, 9, 24), dtype, g)
    w1, b1 = torch.randn(70, 24, generator=g).to(dtype) / 5, torch.randn(70, generator=g).to(dtype)
    w2 = torch.randn(24, 70, generator=g).to(dtype) / 8

    def gradient(dt: torch.dtype) -> torch.Tensor:
        leaf = x.to(dt).requires_grad_()
        return torch.autograd.grad(mlp(leaf, w1.to(dt), b1.to(dt), w2.to(dt), kind), leaf, dy.to(dt))[0]

    with testing.poisoned():
        h, derivative = ops.linear_gelu_derivative(x, w1, b1, kind)
        dx = ops.linear_dgelu(dy, w2, derivative) @ w1
    forward64 = F.gelu(F.linear(x.double(), w1.double(), b1.double()), approximate=kind)
    testing.assert_within_budget(h, forward64, F.gelu(F.linear(x, w1, b1), approximate=kind), "h")
    testing.assert_gradient_close(dx, gradient(torch.float64), gradient(dtype), "dx")
    assert derivative.dtype == ops.derivative_dtype(dtype)


def test_autograd_of_all_inputs(backend: str) -> None:
    g = torch.Generator().manual_seed(2)
    inputs = [torch.randn(s, generator=g) for s in ((2, 5, 12), (20, 12), (20,))]
    checks.gradients(ops.linear_gelu, lambda *x: F.gelu(F.linear(*x)), inputs, torch.randn(2, 5, 20, generator=g))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_propagates(backend: str, dtype: torch.dtype, kind: str) -> None:
    checks.gelu_of_nan(torch.zeros(2, 19, dtype=dtype), kind, torch.empty(2, 19, dtype=ops.derivative_dtype(dtype)))


def test_empty_and_given_outputs(backend: str) -> None:
    h, derivative = ops.linear_gelu_derivative(torch.empty(0, 6), torch.ones(4, 6))
    assert h.shape == derivative.shape == (0, 4)
    out, kept = torch.empty(3, 4), torch.empty(3, 4)
    h, derivative = ops.linear_gelu_derivative(torch.ones(3, 6), torch.ones(4, 6), out=out, derivative=kept)
    assert h is out
    assert derivative is kept


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="approximate must be one of 'none', 'tanh'"):
        ops.gelu_(torch.zeros(2, 2), None, "erf")
    with pytest.raises(ValueError, match="derivative must have the shape of g"):
        ops.dgelu_(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"out must have shape \[3, 4\]"):
        ops.linear_gelu_derivative(torch.ones(3, 6), torch.ones(4, 6), out=torch.empty(3, 5))


def test_opcheck(backend: str) -> None:
    z = testing.randn((1, 3, 8), torch.float32, torch.Generator().manual_seed(3))
    testing.opcheck("gelu_out", (z, torch.ones(8), False, torch.empty(1, 3, 8), torch.empty(1, 3, 8)))
    testing.opcheck("gelu_out", (z, None, True, torch.empty(1, 3, 8), None))
    testing.opcheck("dgelu_", (z.clone(), torch.ones(1, 3, 8)))
