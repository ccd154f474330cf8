"""Gauss-Newton on universal noise: a step that uses the gradient of every image of the batch by itself (ours).

The influence of a noise v is the mean over images of f², f = ‖p̃ − p‖ the change of an image's probabilities. One
backward pass gives f and its gradient g for each image; AdamW averages gradients, a Gauss-Newton step solves for all
images at once:

    d = argmin  mean (f + g·d)² + DAMPING mean ‖g‖² ‖d‖² − 2 w log‖v + d‖  (its log linearised),   ‖d‖ ≤ radius ‖v‖

It moves the noise no further than the images ask for, which leaves it long, and needs about a tenth of AdamW's updates
on a trained model (docs/benchmarks.md). The system has one row an image. In one process on a CPU it is solved by a
factorisation of the rows' products with each other; elsewhere by a few steps of conjugate gradients: products with the
rows, nothing that waits for the device or that a CUDA graph may not hold, one mean over processes for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnull.ops.common import no_autocast

DAMPING = 0.005
"""Fraction of the trace of the system that is added to its diagonal."""
CG_STEPS = 24
"""Solved to 2e-9 for 64 images. Eight steps give as good a noise, but one that depends on the order of the images:
before conjugate gradients have converged, rounding decides what they have found so far."""


@torch.no_grad()
def gauss_newton_step(
    noise: Tensor,
    changes: Tensor,
    rows: Tensor,
    radius: Tensor | float,
    push: Tensor | float = 0.0,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The step d of each noise; the noise stays as it is.

    Args:
        noise: [M, ...], float32 or float64.
        changes: f of each noise on each image [M, B].
        rows: gradient of each of them [M, B, ...], in the noise's dtype.
        radius: longest step, as a fraction of the noise's norm; [M], [] or a number.
        push: [M, ...] or 0, what a term of the objective beside the changes asks for: its negative gradient.
        mean: over processes that hold as many images each; None is one process.

    Returns:
        [M, ...], in the noise's dtype.
    """
    G, v = rows.flatten(2), noise.flatten(1)  # [M, B, P], [M, P]
    wish = push.flatten(1) if isinstance(push, Tensor) else torch.zeros_like(v)
    with no_autocast(rows.device):
        if mean is None and rows.device.type == "cpu":
            step = _factorised(G, changes, wish)
        else:
            step = _conjugate_gradients(G, changes, wish, mean or _alone)
        longest = radius * torch.linalg.vector_norm(v, dim=1)
        fraction = _ratio(longest, torch.linalg.vector_norm(step, dim=1)).clamp(max=1)
    return (step * fraction.unsqueeze(1)).view_as(noise)


def _factorised(G: Tensor, changes: Tensor, wish: Tensor) -> Tensor:
    """The step [M, P] without a radius, from the images' side: d = w − Gᵀ (G Gᵀ + B λ)⁻¹ (f + G w), w = wish / λ."""
    B = G.shape[1]
    system = torch.bmm(G, G.mT)  # [M, B, B]
    diagonal = system.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.sum(1, keepdim=True)  # B λ, [M, 1]
    free = _ratio(B * wish, damping)
    diagonal += torch.where(damping == 0, 1, damping)  # no gradient at all: nothing to solve, and nothing that fails
    factor, _ = torch.linalg.cholesky_ex(system)
    wrong = changes + torch.bmm(G, free.unsqueeze(2)).squeeze(2)
    weights = torch.cholesky_solve(wrong.unsqueeze(2), factor)
    return free - torch.bmm(weights.mT, G).squeeze(1)


def _conjugate_gradients(G: Tensor, changes: Tensor, wish: Tensor, together: Callable[[Tensor], Tensor]) -> Tensor:
    """The same step from the noise's side, of images that may lie on several processes."""

    def back(weights: Tensor) -> Tensor:
        """mean over images of g · weight; [M, P]."""
        return together(torch.bmm(weights.unsqueeze(1), G).squeeze(1) / G.shape[1])

    trace = together(G.square().sum(2).mean(1))  # [M]
    damping = (DAMPING * trace).unsqueeze(1)
    residual = back(-changes) + wish
    step, direction = torch.zeros_like(residual), residual
    length = residual.square().sum(1, keepdim=True)
    for _ in range(CG_STEPS):
        product = back(torch.bmm(G, direction.unsqueeze(2)).squeeze(2)) + damping * direction
        along = _ratio(length, (direction * product).sum(1, keepdim=True))
        step = step + along * direction
        residual = residual - along * product
        before, length = length, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(length, before) * direction
    return step


def _alone(value: Tensor) -> Tensor:
    return value


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, and 0 where the bottom is: there is nothing left to solve, or no step to shorten."""
    return torch.where(bottom == 0, 0.0, top / bottom)
