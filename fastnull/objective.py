"""Distances between the logits of a clean and a noisy view, with the gradients written out, and the influence.

Everything is per image, in float32 or better: softmax differences near ε are small against bf16's spacing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.checks import check_choice

OBJECTIVES = ("l2", "l2_squared")
"""‖Δlogits‖₂ (the paper's first code) and ‖Δlogits‖₂² (its later recipe)."""


def influence(clean: Tensor, noisy: Tensor) -> Tensor:
    """Sum over classes of (p − p̃)², the softmax outputs without and with the noise; its batch mean is tested against ε.

    Args:
        clean, noisy: logits [..., K].

    Returns:
        [...] in float32 (float64 for float64 logits), between 0 and 2. Source: the published code's stop test.
    """
    clean, noisy = _wide(clean), _wide(noisy)
    return (clean.softmax(-1) - noisy.softmax(-1)).square().sum(-1)


def distance(clean: Tensor, noisy: Tensor, kind: str = "l2") -> tuple[Tensor, Tensor]:
    """Distance between logits an image, and its gradient with respect to the noisy ones.

    Args:
        clean, noisy: logits [B, K].
        kind: `l2` or `l2_squared`.

    Returns:
        distance [B] and its gradient [B, K] (0 where the views agree, where `l2` has none), in float32 or better.
    """
    check_choice("objective", kind, OBJECTIVES)
    difference = _wide(noisy) - _wide(clean)  # [B, K]
    if kind == "l2_squared":
        return difference.square().sum(-1), 2 * difference
    length = torch.linalg.vector_norm(difference, dim=-1)  # [B]
    safe = torch.where(length == 0, torch.ones_like(length), length)
    return length, difference / safe.unsqueeze(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
