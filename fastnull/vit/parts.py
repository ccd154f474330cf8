"""The parts of a pre-norm ViT by name, for the written-out encoder. They are the live modules, not copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnull.vit.exact import is_plain_convolution, is_plain_linear, is_plain_norm


class UnsupportedModelError(ValueError):
    """The written-out encoder does not support a part of the model; the message names it."""


def need(condition: bool, what: str) -> None:
    """Raise UnsupportedModelError(what) unless the condition holds."""
    if not condition:
        raise UnsupportedModelError(what)


class LiveLinear:
    """Weight and bias of a linear layer for models with separate query, key and value or with bare parameters.

    Every access to `weight` and `bias` reads the current parameters.
    """

    def __init__(self, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]) -> None:
        self._weight, self._bias = weight, bias

    @classmethod
    def joined(cls, *linears: nn.Linear) -> LiveLinear:
        """Several linears with the same input as one; a missing bias counts as 0 if another one has a bias.

        Raises:
            UnsupportedModelError: one of them is not nn.Linear itself.
        """
        for linear in linears:
            need(is_plain_linear(linear), f"a linear of type {type(linear).__name__}")

        def bias() -> Tensor | None:
            if all(linear.bias is None for linear in linears):
                return None
            return torch.cat([x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears])

        return cls(lambda: torch.cat([linear.weight for linear in linears]), bias)

    @property
    def weight(self) -> Tensor:
        """[out, in], without gradient."""
        return self._weight().detach()

    @property
    def bias(self) -> Tensor | None:
        """[out], without gradient, or None."""
        bias = self._bias()
        return None if bias is None else bias.detach()

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]


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
    qkv: nn.Linear | LiveLinear
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
        pool: `token` (each head reads its own token), `avg` (the mean of the tokens from pool_start on) or `token_avg`
            (token 0 and that mean, joined to 2 D).
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

    def check(self) -> None:
        """Raise UnsupportedModelError unless every layer is of torch's own class, not a subclass."""
        need(is_plain_convolution(self.projection), f"a patch embedding by {type(self.projection).__name__}")
        linears = [linear for _, linear in self.heads]
        norms = [self.norm_pre, self.norm, self.fc_norm]
        for block in self.blocks:
            linears += [block.qkv, block.proj, block.fc1, block.fc2]  # type: ignore[list-item]
            norms += [block.norm1, block.norm2, block.q_norm, block.k_norm]
        for linear in linears:
            plain = isinstance(linear, LiveLinear) or is_plain_linear(linear)
            need(plain, f"a linear of type {type(linear).__name__}")
        for norm in norms:
            need(norm is None or is_plain_norm(norm), f"a norm of type {type(norm).__name__}")
