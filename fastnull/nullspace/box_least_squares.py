"""Box-constrained least squares for many problems with one matrix: the pixels behind token noise."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""A problem is solved when its relative residual is within this of the minimum."""

MAX_STEPS = 20_000
"""Projected-gradient steps after which the best point is returned with a warning."""

_CHECK_EVERY = 10  # steps between checks of the duality gap; a check costs as much as a step


def box_least_squares(matrix: Tensor, target: Tensor, low: Tensor, high: Tensor, start: Tensor) -> Tensor:
    """min ½‖v A − t‖² with low ≤ v ≤ high, one problem per row, all at once.

    FISTA (Beck & Teboulle 2009) with each row's momentum restarted where it points uphill (O'Donoghue & Candès 2015).
    A row is solved when its duality gap, max over s in the box of ⟨∇, v − s⟩, is at most
    ½ TOLERANCE² (‖t‖² + ‖A z‖²), where z is the point of the box nearest to 0.

    Args:
        matrix: A [K, r].
        target: t [M, r].
        low, high: [M, K].
        start: [M, K], any.

    Returns:
        [M, K], exactly within the bounds. Warns (RuntimeWarning) if MAX_STEPS were not enough.
    """
    step = 1 / torch.linalg.matrix_norm(matrix, 2).square().clamp_min(torch.finfo(matrix.dtype).tiny)
    result = start.clamp(low, high)
    # if 0 lies outside the box, ‖t‖ alone may be too small a scale
    scale = target.square().sum(1) + (torch.zeros_like(start).clamp(low, high) @ matrix).square().sum(1)
    enough = 0.5 * TOLERANCE**2 * scale  # [M]
    open_rows = torch.arange(len(target), device=target.device)
    here = ahead = result.clone()
    momentum = torch.ones_like(enough).unsqueeze(1)
    for iteration in range(MAX_STEPS + 1):
        if iteration % _CHECK_EVERY == 0:
            slope = (here @ matrix - target) @ matrix.T
            gap = torch.maximum(slope * (here - low), slope * (here - high)).sum(1)
            going = gap > enough
            result[open_rows] = here
            if not bool(going.any()):
                return result
            open_rows, enough, target, low, high = (x[going] for x in (open_rows, enough, target, low, high))
            here, ahead, momentum = here[going], ahead[going], momentum[going]
        there = (ahead - step * ((ahead @ matrix - target) @ matrix.T)).clamp(low, high)
        moved = there - here
        uphill = ((ahead - there) * moved).sum(1, keepdim=True) > 0
        faster = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = torch.where(uphill, there, there + (momentum - 1) / faster * moved)
        momentum = torch.where(uphill, 1, faster)
        here = there
    warnings.warn(
        f"least squares within bounds: {len(open_rows)} of {len(result)} problems are not within {TOLERANCE:g} of the "
        f"smallest residual after {MAX_STEPS} steps; the best found is returned",
        RuntimeWarning,
        stacklevel=2,
    )
    return result
