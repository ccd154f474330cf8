"""The nearest point of a subspace within bounds, many problems at once: changes of pixels that no token shows."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

TOLERANCE = 1e-7
"""A problem is done when what leaves the subspace is this small against the point asked for."""

MAX_STEPS = 2_000
"""Dual steps after which the best found is returned with a warning."""


def box_projection(wanted: Tensor, normals: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """min ½‖v − w‖² with normalsᵀ v = 0 and low ≤ v ≤ high, one problem a row, all at once.

    By its dual: with multipliers λ the best v within the bounds is clamp(w − normals λ), the dual's gradient is
    normalsᵀ v with Lipschitz constant 1, and λ is found by FISTA (Beck & Teboulle 2009) with each row's momentum
    restarted where it points downhill (O'Donoghue & Candès 2015). A step is two products, and tens of them suffice
    where few bounds hold.

    Args:
        wanted: w [M, K].
        normals: [K, r], orthonormal.
        low, high: [M, K], with low ≤ 0 ≤ high: then 0 is a solution and there is a nearest one.

    Returns:
        [M, K], within the bounds exactly and with ‖normalsᵀ v‖ ≤ TOLERANCE ‖w‖. Warns (RuntimeWarning) where MAX_STEPS
        did not suffice.
    """
    result = torch.zeros_like(wanted)
    enough = TOLERANCE * torch.linalg.vector_norm(wanted, dim=1)  # [M]
    open_rows = torch.arange(len(wanted), device=wanted.device)
    here = ahead = wanted.new_zeros(len(wanted), normals.shape[1])  # λ [M, r]
    momentum = wanted.new_ones(len(wanted), 1)
    for _ in range(MAX_STEPS):
        v = (wanted - ahead @ normals.T).clamp(low, high)
        ascent = v @ normals  # [M, r]
        result[open_rows] = v
        going = torch.linalg.vector_norm(ascent, dim=1) > enough
        if not bool(going.any()):
            return result
        there = ahead + ascent
        moved = there - here
        downhill = (ascent * moved).sum(1, keepdim=True) < 0
        faster = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = torch.where(downhill, there, there + (momentum - 1) / faster * moved)
        momentum = torch.where(downhill, 1, faster)
        here = there
        if not bool(going.all()):
            open_rows, enough, wanted, low, high = (x[going] for x in (open_rows, enough, wanted, low, high))
            here, ahead, momentum = here[going], ahead[going], momentum[going]
    warnings.warn(
        f"nearest point within bounds: {len(open_rows)} of {len(result)} problems leave the subspace by more than "
        f"{TOLERANCE:g} of the point asked for after {MAX_STEPS} steps; the best found is returned",
        RuntimeWarning,
        stacklevel=2,
    )
    return result
