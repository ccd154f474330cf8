"""The measures of noise: distances between the logits with and without it, and the influence.

The op `noise_objective` computes the paper's two distances with their gradients: `l2`, ‖Δlogits‖₂ (the first code
release), and `l2_squared`, ‖Δlogits‖₂² (the recipe behind the published tables). `prediction` is ours, for noise of one
image: the cross entropy of the noisy logits against the class that the model predicts without noise. From a random
start the distances grow in a random direction; the cross entropy grows towards another class. None needs labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.ops.noise_objective import KINDS, noise_objective

__all__ = [
    "OBJECTIVES",
    "PREDICTION",
    "influence",
    "noise_objective",
    "prediction_gradient",
    "probability_change",
]

PREDICTION = "prediction"
OBJECTIVES = (*KINDS, PREDICTION)


def prediction_gradient(clean: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each image's cross entropy against the class predicted without noise, and the influence.

    Args:
        clean, noisy: logits [B, K] without and with the noise.

    Returns:
        The gradient with respect to `noisy` [B, K] and the influence [B], both in float32 (float64 for float64 logits).
        Source: ours; predicted classes instead of labels as in Kurakin et al. 2017.
    """
    gradient = _wide(noisy).softmax(-1)
    gradient.scatter_add_(-1, clean.argmax(-1, keepdim=True), -torch.ones_like(gradient[..., :1]))
    return gradient, influence(clean, noisy)


def influence(clean: Tensor, noisy: Tensor) -> Tensor:
    """Sum over classes of (p − p̃)², with p, p̃ the softmax outputs without and with noise. ε limits its batch mean.

    Args:
        clean, noisy: logits [..., K].

    Returns:
        [...] in float32 (float64 for float64 logits), between 0 and 2. Source: the published code's stop test.
    """
    return (_wide(clean).softmax(-1) - _wide(noisy).softmax(-1)).square().sum(-1)


def probability_change(clean: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """‖p̃ − p‖ of each image, whose square is the influence, and its gradient with respect to the noisy logits.

    Args:
        clean, noisy: logits [B, K].

    Returns:
        [B] and [B, K] in float32 (float64 for float64 logits). Source: ours.
    """
    p = _wide(noisy).softmax(-1)
    gap = p - _wide(clean).softmax(-1)
    change = torch.linalg.vector_norm(gap, dim=-1)
    direction = gap * torch.where(change == 0, 0.0, 1 / change).unsqueeze(-1)
    return change, p * (direction - (p * direction).sum(-1, keepdim=True))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
