"""The parts of a pre-norm ViT by name, for code that writes its forward and backward out by hand.

An adapter hands out the live modules, so whoever reads their weights reads the current ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


class UnsupportedModelError(ValueError):
    """A part of the model has no hand-written form; the message names it."""


@dataclass(frozen=True)
class BlockParts:
    """x + γ₁·proj(attention(qkv(norm1(x)))), then x + γ₂·fc2(gelu(fc1(norm2(x)))).

    Attributes:
        q_norm, k_norm: LayerNorm over the head dimension, or None.
        scale: of the scores.
        gamma1, gamma2: LayerScale [D], or None.
        gelu: `none` (erf) or `tanh`, as torch's `approximate`.
    """

    norm1: nn.LayerNorm
    qkv: nn.Linear
    q_norm: nn.LayerNorm | None
    k_norm: nn.LayerNorm | None
    heads: int
    scale: float
    proj: nn.Linear
    gamma1: Tensor | None
    norm2: nn.LayerNorm
    fc1: nn.Linear
    gelu: str
    fc2: nn.Linear
    gamma2: Tensor | None


@dataclass(frozen=True)
class ViTParts:
    """Everything between the normalised image and the logits.

    Attributes:
        projection: of the patch embedding, kernel = stride.
        positions: () → prefix tokens [P, D] and the position embedding of the image tokens [N, D].
        norm_pre: LayerNorm before the first block, or None.
        norm: LayerNorm after the last block, or None.
        pool: `token` (each head reads its own token) or `avg` (the mean of the tokens from pool_start on).
        fc_norm: LayerNorm after pooling, or None.
        heads: (token, linear): the logits are the mean over heads.
    """

    projection: nn.Conv2d
    positions: Callable[[], tuple[Tensor, Tensor]]
    norm_pre: nn.LayerNorm | None
    blocks: list[BlockParts]
    norm: nn.LayerNorm | None
    pool: str
    pool_start: int
    fc_norm: nn.LayerNorm | None
    heads: list[tuple[int, nn.Linear]]
