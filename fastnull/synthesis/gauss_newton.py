"""Gauss-Newton on universal noise: a step that uses the gradient of every single image of the batch (ours).

The influence of a noise v is the mean over images of f², f = ‖p̃ − p‖ the change of an image's probabilities. One
backward pass gives f and its gradient g for each image. AdamW averages the gradients. A Gauss-Newton step solves for
all images at once:

    d = argmin  mean (f + g·d)² + DAMPING mean ‖g‖² ‖d‖² − 2 w log‖v + d‖  (its log linearised),   ‖d‖ ≤ radius ‖v‖

It moves the noise no further than the images require, so the noise stays long. On a trained model it needs about a
tenth of AdamW's updates (docs/benchmarks.md).

With the gradients as rows of G [B, P], a single process solves a system of size [B, B] and passes over the rows twice:
for their products with each other and for the step, and once more where there is a term in w. A CPU factorises that
system. A GPU uses conjugate gradients, which a CUDA graph can hold. Several processes, each with rows of its own, use
conjugate gradients for the step [P]: 2 passes and one mean over processes per iteration, 50 passes in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnull.ops.common import no_autocast

DAMPING = 0.005
"""Fraction of the trace of the system that is added to its diagonal."""
CG_STEPS = 24
"""Iterations; they solve a system of 64 images to 2e-9. With eight the noise is as good, but it depends on the order of
the images: before conjugate gradients have converged, rounding decides what they have found so far."""


@torch.no_grad()
def gauss_newton_step(
    noise: Tensor,
    changes: Tensor,
    rows: Tensor,
    radius: Tensor | float,
    push: Tensor | float = 0.0,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The step d of each noise; the noise itself is not changed.

    Args:
        noise: [M, ...], float32 or float64.
        changes: f of each noise on each image [M, B].
        rows: gradient of each of them [M, B, ...], in the noise's dtype.
        radius: longest step, as a fraction of the noise's norm; [M], [] or a number.
        push: [M, ...] or 0: negative gradient of any other term of the objective.
        mean: takes means over processes that hold equally many images; None is one process.

    Returns:
        [M, ...], in the noise's dtype.
    """
    G, v = rows.flatten(2), noise.flatten(1)  # [M, B, P], [M, P]
    wish = push.flatten(1) if isinstance(push, Tensor) else None
    with no_autocast(rows.device):
        step = _from_images(G, changes, wish) if mean is None else _from_noise(G, changes, wish, mean)
        longest = radius * torch.linalg.vector_norm(v, dim=1)
        fraction = _ratio(longest, torch.linalg.vector_norm(step, dim=1)).clamp(max=1)
    return (step * fraction.unsqueeze(1)).view_as(noise)


def _from_images(G: Tensor, changes: Tensor, wish: Tensor | None) -> Tensor:
    """The step [M, P] without a radius: d = w − Gᵀ (G Gᵀ + B λ)⁻¹ (f + G w), w = wish / λ."""
    B = G.shape[1]
    system = torch.bmm(G, G.mT)  # [M, B, B]
    diagonal = system.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.sum(1, keepdim=True)  # B λ, [M, 1]
    diagonal += torch.where(damping == 0, 1, damping)  # without any gradient the system would be 0
    solve = _by_cholesky if G.device.type == "cpu" else _by_conjugate_gradients
    if wish is None:
        return -_combined(solve(system, changes), G)
    free = _ratio(B * wish, damping)
    return free - _combined(solve(system, changes + torch.bmm(G, free.unsqueeze(2)).squeeze(2)), G)


def _by_cholesky(system: Tensor, right: Tensor) -> Tensor:
    """x [M, B] of system [M, B, B] · x = right."""
    factor, _ = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)


def _by_conjugate_gradients(system: Tensor, right: Tensor) -> Tensor:
    """The same; it waits for nothing."""
    return _conjugate_gradients(lambda x: torch.bmm(system, x.unsqueeze(2)).squeeze(2), right)


def _from_noise(G: Tensor, changes: Tensor, wish: Tensor | None, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The same step, of images that lie on several processes: (mean g gᵀ + λ) d = wish − mean g f."""

    def back(weights: Tensor) -> Tensor:
        """mean over images of g · weight; [M, P]."""
        return mean(_combined(weights, G) / G.shape[1])

    trace = mean(torch.linalg.vector_norm(G, dim=2).square().mean(1))  # [M]
    damping = (DAMPING * trace).unsqueeze(1)
    right = back(-changes)
    return _conjugate_gradients(
        lambda x: back(torch.bmm(G, x.unsqueeze(2)).squeeze(2)) + damping * x, right if wish is None else right + wish
    )


def _combined(weights: Tensor, G: Tensor) -> Tensor:
    """Gᵀ · weights: the rows [M, B, P] with weights [M, B]; [M, P]."""
    return torch.bmm(weights.unsqueeze(1), G).squeeze(1)


def _conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """x [M, n] with product(x) = right, for symmetric positive systems; 0 where `right` is."""
    x, residual, direction = torch.zeros_like(right), right, right
    length = residual.square().sum(1, keepdim=True)
    for _ in range(CG_STEPS):
        image = product(direction)
        along = _ratio(length, (direction * image).sum(1, keepdim=True))
        x = x + along * direction
        residual = residual - along * image
        before, length = length, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(length, before) * direction
    return x


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, and 0 where the bottom is: there is nothing left to solve, or no step to shorten."""
    return torch.where(bottom == 0, 0.0, top / bottom)
