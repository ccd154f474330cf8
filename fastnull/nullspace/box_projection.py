"""The nearest point of a subspace within bounds, many problems at once: pixel changes that leave all tokens equal."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

TOLERANCE = 1e-7
"""A point is in the subspace when its part outside is at most this fraction of the wanted point."""

GAP = 5e-3
"""A finished point is accepted when half its squared distance is within this fraction of the minimum."""

MAX_STEPS = 3_000
"""Dual steps after which the best point is returned with a warning."""

_FINISH_EVERY = 50  # steps between attempts to finish; an attempt costs about as many steps
_FINISH_STEPS = 40


def box_projection(wanted: Tensor, normals: Tensor, low: Tensor, high: Tensor, weights: Tensor | None = None) -> Tensor:
    """min ½‖v − w‖² with normalsᵀ v = 0 and low ≤ v ≤ high, one problem per row, all at once.

    Solves the dual. With multipliers λ the best v within the bounds is clamp(w − normals λ), and the dual's gradient is
    normalsᵀ v with Lipschitz constant 1. λ is found by FISTA (Beck & Teboulle 2009) with each row's momentum restarted
    where it points downhill (O'Donoghue & Candès 2015). A step costs two products; tens of steps are enough if few
    bounds are active. If many are (a black patch can only become brighter) λ converges slowly. Every few steps v is
    therefore moved onto the subspace by its values off the bounds, and accepted if the dual bound shows that it is near
    the optimum (ours).

    Args:
        wanted: w [M, K].
        normals: [K, r], orthonormal.
        low, high: [M, K], with low ≤ 0 ≤ high, so that 0 is feasible.
        weights: weight of each normal in the part outside the subspace [r], at most 1; None is 1.

    Returns:
        [M, K], exactly within the bounds, with ‖weights · normalsᵀ v‖ ≤ TOLERANCE ‖w‖ and ½‖v − w‖² within GAP of the
        minimum. Warns (RuntimeWarning) if MAX_STEPS were not enough.
    """
    result = torch.zeros_like(wanted)
    weights = normals.new_ones(normals.shape[1]) if weights is None else weights
    enough = TOLERANCE * torch.linalg.vector_norm(wanted, dim=1)  # [M]
    open_rows = torch.arange(len(wanted), device=wanted.device)
    here = ahead = wanted.new_zeros(len(wanted), normals.shape[1])  # λ [M, r]
    momentum = wanted.new_ones(len(wanted), 1)
    for step in range(1, MAX_STEPS + 1):
        v = (wanted - ahead @ normals.T).clamp(low, high)
        ascent = v @ normals  # [M, r]
        done = torch.linalg.vector_norm(ascent * weights, dim=1) <= enough
        if step % _FINISH_EVERY == 0 and not bool(done.all()):
            finished = _finish(v, normals, weights, low, high, enough)
            # ½‖v − w‖² + λᵀ normalsᵀ v at this v is a lower bound of every solution's ½‖v − w‖²
            bound = 0.5 * (v - wanted).square().sum(1) + (ahead * ascent).sum(1)
            near = 0.5 * (finished - wanted).square().sum(1) <= (1 + GAP) * bound
            v = torch.where((near & ~done).unsqueeze(1), finished, v)
            done = done | near
        result[open_rows] = v
        if bool(done.all()):
            return result
        there = ahead + ascent
        moved = there - here
        downhill = (ascent * moved).sum(1, keepdim=True) < 0
        faster = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = torch.where(downhill, there, there + (momentum - 1) / faster * moved)
        momentum = torch.where(downhill, 1, faster)
        here = there
        if bool(done.any()):
            kept = ~done
            open_rows, enough, wanted, low, high = (x[kept] for x in (open_rows, enough, wanted, low, high))
            here, ahead, momentum = here[kept], ahead[kept], momentum[kept]
    warnings.warn(
        f"nearest point within bounds: {len(open_rows)} of {len(result)} problems leave the subspace by more than "
        f"{TOLERANCE:g} of the wanted point after {MAX_STEPS} steps; the best points are returned",
        RuntimeWarning,
        stacklevel=2,
    )
    return result


def _finish(v: Tensor, normals: Tensor, weights: Tensor, low: Tensor, high: Tensor, enough: Tensor) -> Tensor:
    """Move v [M, K] until ‖weights · normalsᵀ v‖ ≤ enough [M]: by the least change of the values off their bounds
    (conjugate gradients), and if that does not converge by scaling towards 0."""
    room = ((v > low) & (v < high)).to(v.dtype)
    left = v @ normals  # [M, r]
    direction, length = left, left.square().sum(1, keepdim=True)
    multipliers = torch.zeros_like(left)
    tiny = torch.finfo(v.dtype).tiny
    for _ in range(_FINISH_STEPS):
        if bool((torch.linalg.vector_norm(left * weights, dim=1) <= 0.5 * enough).all()):
            break
        image = ((direction @ normals.T) * room) @ normals
        along = length / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        multipliers = multipliers + along * direction
        left = left - along * image
        shorter = left.square().sum(1, keepdim=True)
        direction = left + shorter / length.clamp_min(tiny) * direction
        length = shorter
    moved = (v - room * (multipliers @ normals.T)).clamp(low, high)
    leak = torch.linalg.vector_norm((moved @ normals) * weights, dim=1)
    return moved * torch.where(leak > enough, 0.99 * enough / leak, 1).unsqueeze(1)
