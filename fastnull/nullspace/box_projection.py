"""The nearest point of a subspace within bounds, many problems at once: changes of pixels that no token shows."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

TOLERANCE = 1e-7
"""A point is within the subspace when what leaves it is this small against the point asked for."""

GAP = 5e-3
"""A finished point is taken when half its squared distance is within this fraction of the smallest one possible."""

MAX_STEPS = 3_000
"""Dual steps after which the best found is returned with a warning."""

_FINISH_EVERY = 50  # steps between tries: a try costs as much as as many steps
_FINISH_STEPS = 40


def box_projection(wanted: Tensor, normals: Tensor, low: Tensor, high: Tensor, weights: Tensor | None = None) -> Tensor:
    """min ½‖v − w‖² with normalsᵀ v = 0 and low ≤ v ≤ high, one problem a row, all at once.

    By its dual: with multipliers λ the best v within the bounds is clamp(w − normals λ), the dual's gradient is
    normalsᵀ v with Lipschitz constant 1, and λ is found by FISTA (Beck & Teboulle 2009) with each row's momentum
    restarted where it points downhill (O'Donoghue & Candès 2015). A step is two products, and tens of them suffice
    where few bounds hold. Where many do (a black patch can only become brighter) λ has far to go; there, now and then,
    the v at hand is finished: moved onto the subspace by the values that have room, and taken if the dual says that it
    is near enough to the best (ours).

    Args:
        wanted: w [M, K].
        normals: [K, r], orthonormal.
        low, high: [M, K], with low ≤ 0 ≤ high: then 0 is a solution and there is a nearest one.
        weights: how much each normal counts in what leaves the subspace [r], at most 1; None counts all in full.

    Returns:
        [M, K], within the bounds exactly, with ‖weights · normalsᵀ v‖ ≤ TOLERANCE ‖w‖ and ½‖v − w‖² within GAP of the
        least possible. Warns (RuntimeWarning) where MAX_STEPS did not suffice.
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
            # ½‖v − w‖² + λᵀ normalsᵀ v at the v that λ asks for is a lower bound on every solution's ½‖v − w‖²
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
        f"{TOLERANCE:g} of the point asked for after {MAX_STEPS} steps; the best found is returned",
        RuntimeWarning,
        stacklevel=2,
    )
    return result


def _finish(v: Tensor, normals: Tensor, weights: Tensor, low: Tensor, high: Tensor, enough: Tensor) -> Tensor:
    """v [M, K] moved until ‖weights · normalsᵀ v‖ ≤ enough [M]: by the least change of the values that are off their
    bounds, found by conjugate gradients, and where that is out of reach by shrinking towards 0."""
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
