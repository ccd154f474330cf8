"""The nearest point of a subspace within bounds: against scipy, against its optimality conditions, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastnull import box_projection as module
from fastnull.box_projection import TOLERANCE, box_projection


def problem(unknowns: int, normals: int, rows: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    orthonormal = torch.linalg.qr(torch.randn(unknowns, normals, dtype=torch.float64))[0]
    wanted = torch.randn(rows, unknowns, dtype=torch.float64)
    low, high = (sign * torch.rand(rows, unknowns, dtype=torch.float64) for sign in (-1, 1))
    return wanted, orthonormal, low, high


@pytest.mark.parametrize(("unknowns", "normals"), [(12, 3), (48, 8), (48, 40), (27, 26)])
@pytest.mark.parametrize("room", [0.1, 1.0, 20.0])  # nearly all, some and none of the bounds hold
def test_agrees_with_scipy(unknowns: int, normals: int, room: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    wanted, across, low, high = problem(unknowns, normals)
    low, high = room * low, room * high
    found = box_projection(wanted, across, low, high)
    assert bool(((found >= low) & (found <= high)).all())
    assert bool(((found @ across).norm(dim=1) <= TOLERANCE * wanted.norm(dim=1)).all())
    weight = 1e4  # the equations as a penalty: 1e-8 of them is left
    matrix = np.vstack([np.eye(unknowns), weight * across.T.numpy()])
    for i in range(len(wanted)):
        aim = np.concatenate([wanted[i].numpy(), np.zeros(normals)])
        best = optimize.lsq_linear(matrix, aim, (low[i].numpy(), high[i].numpy()), tol=1e-14, max_iter=500)
        distance = float((found[i] - wanted[i]).norm())
        assert distance <= 1.0001 * np.sqrt(2 * best.cost) + 1e-9, (i, distance, np.sqrt(2 * best.cost))


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
