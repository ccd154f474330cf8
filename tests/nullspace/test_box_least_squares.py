"""Least squares within bounds against scipy's active-set solver, and what happens at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastnull.nullspace import box_least_squares as module
from fastnull.nullspace.box_least_squares import TOLERANCE, box_least_squares

# unknowns x equations: 20x12 = more unknowns (a kernel), 12x12 = square, 8x12 = over-determined
SHAPES = [(20, 12), (12, 12), (8, 12)]


def _residual(matrix: torch.Tensor, target: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(v @ matrix - target, dim=1)


@pytest.mark.parametrize(("unknowns", "equations"), SHAPES)
@pytest.mark.parametrize("bound", [0.02, 0.3, 50.0])  # nearly all, some and none of the bounds active
def test_agrees_with_scipy(unknowns: int, equations: int, bound: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    matrix = torch.randn(unknowns, equations, dtype=torch.float64)
    target = torch.randn(5, equations, dtype=torch.float64)
    low = -bound * torch.rand(5, unknowns, dtype=torch.float64)
    high = bound * torch.rand(5, unknowns, dtype=torch.float64)
    v = box_least_squares(matrix, target, low, high, torch.zeros_like(low))
    assert bool(((v >= low) & (v <= high)).all())
    found = _residual(matrix, target, v)
    for i in range(5):
        bounds = (low[i].numpy(), high[i].numpy())
        best = optimize.lsq_linear(matrix.T.numpy(), target[i].numpy(), bounds, method="bvls")
        length = float(target[i].norm())
        smallest = np.sqrt(2 * best.cost)
        assert abs(float(found[i]) - smallest) <= TOLERANCE * length, (i, found[i], smallest)


def test_agrees_with_scipy_where_convergence_is_slow() -> None:
    """Singular values over three decades: thousands of steps, so a stop that is too early shows."""
    optimize = pytest.importorskip("scipy.optimize")
    u, v = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0] for _ in range(2))
    matrix = (u * torch.logspace(0, -3, 40, dtype=torch.float64)) @ v
    target = torch.randn(3, 40, dtype=torch.float64)
    low = torch.full((3, 40), -3.0, dtype=torch.float64)
    found = _residual(matrix, target, box_least_squares(matrix, target, low, -low, torch.zeros_like(low)))
    for i in range(3):
        best = optimize.lsq_linear(matrix.T.numpy(), target[i].numpy(), (-3.0, 3.0), method="bvls")
        assert abs(float(found[i]) - np.sqrt(2 * best.cost)) <= 1e-6 * float(target[i].norm())


def test_start_does_not_matter_and_rows_are_independent() -> None:
    matrix, target = torch.randn(20, 12, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    low, high = torch.full((6, 20), -0.2, dtype=torch.float64), torch.full((6, 20), 0.1, dtype=torch.float64)
    zero = box_least_squares(matrix, target, low, high, torch.zeros_like(low))
    far = box_least_squares(matrix, target, low, high, torch.full_like(low, 1e3))
    flipped = box_least_squares(matrix, target.flip(0), low, high, torch.zeros_like(low)).flip(0)
    for other in (far, flipped):
        torch.testing.assert_close(_residual(matrix, target, zero), _residual(matrix, target, other), rtol=0, atol=1e-3)


def test_zero_outside_the_box_and_fixed_unknowns() -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    low = torch.tensor([[0.5, -1, 0.25]], dtype=torch.float64)
    high = torch.tensor([[1, 1, 0.25]], dtype=torch.float64)
    v = box_least_squares(matrix, torch.zeros(1, 3, dtype=torch.float64), low, high, torch.ones_like(low))
    torch.testing.assert_close(v, torch.tensor([[0.5, 0, 0.25]], dtype=torch.float64), rtol=0, atol=1e-4)


def test_no_problems_and_no_equations() -> None:
    assert box_least_squares(*(torch.zeros(s) for s in ((4, 3), (0, 3), (0, 4), (0, 4), (0, 4)))).shape == (0, 4)
    low = torch.zeros(2, 4)
    v = box_least_squares(torch.zeros(4, 0), torch.zeros(2, 0), low, low + 1, low - 1)
    assert torch.equal(v, low)


def test_warns_when_it_runs_out_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STEPS", 3)
    matrix = torch.randn(12, 12, dtype=torch.float64)
    low = torch.full((2, 12), -0.3, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="2 of 2 problems"):
        v = box_least_squares(matrix, torch.randn(2, 12, dtype=torch.float64), low, -low, torch.zeros_like(low))
    assert bool((v.abs() <= 0.3).all())
