"""The frozen encoder: logits, and the gradient of anything of the logits with respect to the tokens, never a weight's.

`FrozenEncoder` is what synthesis runs hundreds of times. The `reference` backend is the model's own modules under
autograd with frozen parameters: it works for any model that has an adapter and is the oracle for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastnull.checks import check_choice
from fastnull.vit.base import SplitViT, as_split, check_site, frozen, split

BACKENDS = ("auto", "reference")

Cotangent: TypeAlias = "Tensor | Callable[[Tensor], Tensor | tuple[Tensor, ...]]"


class FrozenEncoder:
    """A ViT from the noise site to the logits, in eval mode, whose weights never get a gradient.

    Args:
        model: a ViT (NormalizedModel, plain, compiled or DDP-wrapped), or an adapter.
        dtype: compute dtype; None is the model's own. With another one the encoder holds a copy of the weights.
        backend: `auto` takes the fastest one for the model and device, `reference` the model's own modules.
        site: `patch`, `block0` or `pixels`; see fastnull.vit.SITES.

    Raises:
        ValueError: unknown backend or site, or a model that no adapter knows.
    """

    def __init__(
        self,
        model: nn.Module | SplitViT,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        site: str = "patch",
    ) -> None:
        check_choice("backend", backend, BACKENDS)
        self.site = check_site(site)
        self.backend = "reference"
        self._live = as_split(model)
        weight = self._live.projection.weight
        self.dtype = dtype or weight.dtype
        self._split = self._live
        if self.dtype != weight.dtype:
            self._split = split(copy.deepcopy(self._live.model).to(self.dtype))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._live.projection.weight.device

    @property
    def vit(self) -> SplitViT:
        """The adapter of the live model."""
        return self._live

    @torch.no_grad()
    def sync(self) -> None:
        """Take over the model's current weights and buffers, in place. Nothing to do where the model itself runs."""
        if self._split is self._live:
            return
        for mine, theirs in ((self._split.model, self._live.model),):
            for target, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                target.copy_(source)
            for target, source in zip(mine.buffers(), theirs.buffers(), strict=True):
                target.copy_(source)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Images as the model takes them [B, C, H, W] → the tensor at the site: [B, N, D], [B, P + N, D] or images.

        Always in `dtype`, without gradient.
        """
        with frozen(self._split.model), _no_autocast(images):
            return self._split.embed(images.to(self.dtype), self.site)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """The tensor at the site → logits [B, K], without gradient."""
        with frozen(self._split.model), _no_autocast(tokens):
            return self._split.logits(tokens.to(self.dtype), self.site)

    def input_gradient(self, tokens: Tensor, cotangent: Cotangent, *, sum_batch: bool = False) -> tuple[Tensor, Tensor]:
        """Logits, and the gradient of Σ logits · cotangent with respect to the tokens.

        Args:
            tokens: at the site [B, ...].
            cotangent: [B, K], or a function of the logits that returns it, alone or first in a tuple.
            sum_batch: return the gradient summed over the batch, as one noise shared by all images needs it.

        Returns:
            logits [B, K] and the gradient, shaped as the tokens or, with `sum_batch`, without their batch dimension.
        """
        with frozen(self._split.model), _no_autocast(tokens), torch.enable_grad():
            leaf = tokens.detach().to(self.dtype).requires_grad_(True)
            logits = self._split.logits(leaf, self.site)
            weights = cotangent(logits.detach()) if callable(cotangent) else cotangent
            if isinstance(weights, tuple):
                weights = weights[0]
            (gradient,) = torch.autograd.grad(logits, leaf, weights.to(logits.dtype))
        return logits.detach(), gradient.sum(0) if sum_batch else gradient


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """The dtype is this encoder's own, also inside a caller's autocast region."""
    return torch.autocast(tensor.device.type, enabled=False)
