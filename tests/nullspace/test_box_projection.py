"""The nearest point of a subspace within bounds: against scipy, against its optimality conditions, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastnull.nullspace import box_projection as module
from fastnull.nullspace.box_projection import GAP, TOLERANCE, box_projection


def nearest_by_scipy(wanted: Tensor, across: Tensor, low: Tensor, high: Tensor) -> list[float]:
    """Distances of the best solutions, one per row, with the equations as a penalty (error 1e-8)."""
    optimize = pytest.importorskip("scipy.optimize")
    matrix = np.vstack([np.eye(len(across)), 1e4 * across.T.numpy()])
    found = []
    for aim, lowest, highest in zip(wanted, low, high, strict=True):
        aims = np.concatenate([aim.numpy(), np.zeros(across.shape[1])])
        best = optimize.lsq_linear(matrix, aims, (lowest.numpy(), highest.numpy()), tol=1e-14, max_iter=500)
        found.append(float(np.sqrt(2 * best.cost)))
    return found


def problem(unknowns: int, normals: int, rows: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    orthonormal = torch.linalg.qr(torch.randn(unknowns, normals, dtype=torch.float64))[0]
    wanted = torch.randn(rows, unknowns, dtype=torch.float64)
    low, high = (sign * torch.rand(rows, unknowns, dtype=torch.float64) for sign in (-1, 1))
    return wanted, orthonormal, low, high


@pytest.mark.parametrize(("unknowns", "normals"), [(12, 3), (48, 8), (48, 40), (27, 26)])
@pytest.mark.parametrize("room", [0.1, 1.0, 20.0])  # nearly all, some and none of the bounds hold
def test_agrees_with_scipy(unknowns: int, normals: int, room: float) -> None:
    wanted, across, low, high = problem(unknowns, normals)
    low, high = room * low, room * high
    found = box_projection(wanted, across, low, high)
    assert bool(((found >= low) & (found <= high)).all())
    assert bool(((found @ across).norm(dim=1) <= TOLERANCE * wanted.norm(dim=1)).all())
    best = torch.tensor(nearest_by_scipy(wanted, across, low, high))
    assert bool(((found - wanted).norm(dim=1) <= (1 + GAP / 2) * best + 1e-6).all())


def dark(side: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dark patches of side² values and smooth filters, as in trained embeddings, with the filters' strengths: few
    values have room on both sides, and FISTA alone takes thousands of steps."""
    frequency = torch.fft.fftfreq(side)
    fall = 1 / (torch.hypot(frequency[:, None], frequency) + 1 / side)
    white = torch.randn(count, side, side, dtype=torch.float64)
    filters = torch.fft.ifft2(torch.fft.fft2(white) * fall).real.flatten(1)
    _, strengths, across = torch.linalg.svd(filters, full_matrices=False)
    pixels = (torch.rand(6, side * side, dtype=torch.float64) - torch.linspace(0.3, 1.0, 6)[:, None]).clamp(min=0)
    return 1 - 2 * pixels.round(), across.T, -pixels, 1 - pixels, strengths / strengths[0]


@pytest.mark.parametrize(("side", "count"), [(6, 12), (8, 12), (8, 40)])
def test_few_values_with_room(side: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, across, low, high, strengths = dark(side, count)
    finished = []
    finish = module._finish
    monkeypatch.setattr(module, "_finish", lambda *args: finished.append(finish(*args)) or finished[-1])
    found = box_projection(wanted, across, low, high, strengths)
    assert finished  # plain steps were not enough
    assert bool(((found >= low) & (found <= high)).all())
    leak = ((found @ across) * strengths).norm(dim=1)
    assert bool((leak <= TOLERANCE * wanted.norm(dim=1)).all())
    best = torch.tensor(nearest_by_scipy(wanted, across, low, high))
    assert bool(((found - wanted).norm(dim=1) <= (1 + GAP / 2) * best + 1e-6).all())


def test_without_bounds_it_is_the_orthogonal_projection() -> None:
    wanted, across, low, high = problem(20, 7)
    found = box_projection(wanted, across, 1e3 * low.sign(), 1e3 * high.sign())
    torch.testing.assert_close(found, wanted - wanted @ across @ across.T)


def test_rows_are_independent() -> None:
    wanted, across, low, high = problem(30, 10)
    together = box_projection(wanted, across, low, high)
    alone = torch.cat([box_projection(*(x[i : i + 1] if x is not across else x for x in (wanted, across, low, high)))
                       for i in range(len(wanted))])  # fmt: skip
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_no_room_nothing_wanted_and_no_problems() -> None:
    wanted, across, low, high = problem(12, 3)
    zero = torch.zeros_like(wanted)
    assert torch.equal(box_projection(wanted, across, zero, zero), zero)
    assert torch.equal(box_projection(zero, across, low, high), zero)
    assert box_projection(zero[:0], across, low[:0], high[:0]).shape == (0, 12)


def test_warns_when_it_runs_out_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STEPS", 2)
    wanted, across, low, high = problem(30, 10)
    with pytest.warns(RuntimeWarning, match="6 of 6 problems"):
        found = box_projection(wanted, across, low, high)
    assert bool(((found >= low) & (found <= high)).all())
