"""Norms that neither underflow nor overflow, and what is made of them."""

from __future__ import annotations

import pytest
import torch

from fastnull.synthesis.solvers import log_norm_gradient, norms

SIZES = [1e-37, 1e-30, 1e-23, 1e-10, 1.0, 1e10, 1e19, 1e30, 1e36]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_norms_of_noise_of_any_size(size: float, dtype: torch.dtype) -> None:
    noise = torch.stack([torch.linspace(-1, 1, 60, dtype=torch.float64), torch.zeros(60)]).view(2, 4, 15)
    expected = noise.flatten(1).norm(dim=1) * size
    measured = norms((noise * size).to(dtype))
    assert measured.dtype == dtype
    torch.testing.assert_close(measured.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [size for size in SIZES if size >= 1e-30])
def test_the_gradient_of_the_log_of_a_norm_is_autograds(size: float) -> None:
    """1 / the norm in length; and none for noise of zero, which has no direction."""
    noise = torch.stack([torch.linspace(-1, 1, 60), torch.zeros(60)]).view(2, 4, 15) * size
    leaf = noise.double().requires_grad_()
    (expected,) = torch.autograd.grad(0.3 * leaf[0].norm().log(), leaf)
    gradient = log_norm_gradient(noise, 0.3)
    assert isinstance(gradient, torch.Tensor)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=0)
    assert log_norm_gradient(noise, 0.0) == 0.0


def test_the_gradient_of_the_log_of_a_tiny_norm_is_finite() -> None:
    gradient = log_norm_gradient(torch.full((1, 4), 1e-40), 1.0)
    assert isinstance(gradient, torch.Tensor)
    assert gradient.isfinite().all()
