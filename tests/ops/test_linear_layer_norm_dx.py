"""The fold of LayerNorm's backward into a product: the formula against autograd in float64, and its row sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnull import ops, testing

EPS = 1e-6


def problem(M: int, K: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear after a norm in this dtype: dz, weight and bias with the affine folded in, x, z, dres."""
    source = torch.Generator().manual_seed(0)
    x, dz, dres = (torch.randn(M, n, generator=source).to(dtype) for n in (D, K, D))
    x = x + 3
    weight, bias = torch.randn(K, D, generator=source).to(dtype) / D**0.5, torch.randn(K, generator=source).to(dtype)
    z = F.linear(F.layer_norm(x, (D,), eps=EPS), weight, bias)
    return {"dz": dz, "weight": weight, "bias": bias, "x": x, "z": z, "dres": dres}


def by_autograd(p: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    leaf = p["x"].to(dtype).requires_grad_()
    z = F.linear(F.layer_norm(leaf, leaf.shape[-1:], eps=EPS), p["weight"].to(dtype), p["bias"].to(dtype))
    return torch.autograd.grad(z, leaf, p["dz"].to(dtype))[0] + p["dres"].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "K", "D"), [(9, 60, 20), (1, 3, 7), (65, 192, 64)])
def test_it_is_the_norms_backward_after_the_product(M: int, K: int, D: int, dtype: torch.dtype) -> None:
    p = problem(M, K, D, dtype)
    _, mean, rstd = ops.layer_norm_stats(p["x"], eps=EPS)
    c1, c2 = ops.layer_norm_sums(p["dz"], p["z"], p["weight"], p["bias"])
    out = torch.full_like(p["x"], float("nan"))
    dx = ops.linear_layer_norm_dx(p["dz"], p["weight"], p["x"], mean, rstd, c1, c2, p["dres"], out=out)
    assert dx is out
    exact = by_autograd(p, torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(dx, exact, rtol=1e-12, atol=1e-12)
    else:
        testing.assert_gradient_close(dx, exact, by_autograd(p, dtype), "dx")
    assert ops.linear_layer_norm_dx(p["dz"], p["weight"], p["x"], mean, rstd, c1, c2, out=p["dres"]).isfinite().all()


def test_row_sums_are_those_of_the_normalised_rows_gradient() -> None:
    p = problem(5, 12, 8, torch.float64)
    c1, c2 = ops.layer_norm_sums(p["dz"], p["z"], p["weight"], p["bias"])
    dxhat, xhat = p["dz"] @ p["weight"], F.layer_norm(p["x"], (8,), eps=EPS)
    torch.testing.assert_close(c1, dxhat.sum(1))
    torch.testing.assert_close(c2, (dxhat * xhat).sum(1))


def test_packed_qkv_gives_the_sums_head_by_head() -> None:
    """What attention's backward would add up: dq (q - b_q) + dk (k - b_k) + dv (v - b_v)."""
    p = problem(6, 3 * 2 * 4, 8, torch.float64)
    dq, dk, dv = p["dz"].view(6, 3, 8).unbind(1)
    q, k, v = (p["z"] - p["bias"]).view(6, 3, 8).unbind(1)
    _, c2 = ops.layer_norm_sums(p["dz"], p["z"], p["weight"], p["bias"])
    torch.testing.assert_close(c2, (dq * q + dk * k + dv * v).sum(1))


def test_shapes_are_checked_and_the_op_is_sound() -> None:
    p, row = problem(5, 12, 8, torch.float32), torch.ones(5)
    with pytest.raises(ValueError, match=r"dz \[5, 12\], weight \[8, 12\] and x \[5, 8\] do not fit"):
        ops.linear_layer_norm_dx(p["dz"], p["weight"].t(), p["x"], row, row, row, row)
    with pytest.raises(ValueError, match=r"c2 must have shape \[5\]; got \[4\]"):
        ops.linear_layer_norm_dx(p["dz"], p["weight"], p["x"], row, row, row, row[:4])
    with pytest.raises(ValueError, match=r"dres must have the shape of x"):
        ops.linear_layer_norm_dx(p["dz"], p["weight"], p["x"], row, row, row, row, row)
    arguments = (p["dz"], p["weight"], p["x"], row, row, row, row, None, torch.empty_like(p["x"]))
    testing.opcheck("linear_layer_norm_dx_out", arguments)
