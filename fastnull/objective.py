"""What synthesis judges noise by: distances between the logits of two views, and the influence.

The distances with their gradients are the op `noise_objective`; the paper's two are its kinds `l2`, ‖Δlogits‖₂ (the
first code release), and `l2_squared`, ‖Δlogits‖₂² (the recipe behind the published tables).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.ops.noise_objective import KINDS, noise_loss, noise_objective

__all__ = ["OBJECTIVES", "influence", "noise_loss", "noise_objective"]

OBJECTIVES = KINDS


def influence(clean: Tensor, noisy: Tensor) -> Tensor:
    """Sum over classes of (p − p̃)², the softmax outputs without and with the noise; its batch mean is tested against ε.

    Args:
        clean, noisy: logits [..., K].

    Returns:
        [...] in float32 (float64 for float64 logits), between 0 and 2. Source: the published code's stop test.
    """
    return (_wide(clean).softmax(-1) - _wide(noisy).softmax(-1)).square().sum(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
