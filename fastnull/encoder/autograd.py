"""The `reference` backend of the encoder: the model's own modules under autograd, with frozen parameters.

It runs any model that an adapter splits, on any device. It has the methods of the written-out encoder
(fastnull.encoder.explicit), which is tested against it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from fastnull.distributed.sharded import Units
from fastnull.vit.base import SplitViT, frozen
from fastnull.vit.exact import first_difference


class NoGradientError(ValueError):
    """The model's logits do not depend on its input in the graph of autograd."""

    def __init__(self) -> None:
        super().__init__(
            "the logits of the model have no gradient with respect to its input, from which the noise is made: its "
            "forward runs (in part) under torch.no_grad() or torch.inference_mode(), or detaches. To train a head "
            "alone, call backbone.requires_grad_(False) instead; NullspaceAugment's mode 'random' needs no gradient"
        )


class AutogradEncoder:
    """Calls the live model if it has the given dtype, otherwise a copy in that dtype.

    Args:
        vit: adapter of the live model.
        dtype: of the computation.
    """

    def __init__(self, vit: SplitViT, dtype: torch.dtype) -> None:
        self.dtype = self.compute = dtype
        self._live = self._vit = vit
        self._exact = True
        if dtype != vit.projection.weight.dtype:
            self.copy()

    def copy(self) -> None:
        """From now on, call a copy of the model, which `sync` updates."""
        if self._vit is self._live:
            self._vit = copy.deepcopy(self._live)
            self._vit.model.to(self.dtype)
            self._exact = first_difference(self._live.model.named_modules()) is None

    @torch.no_grad()
    def sync(self, units: Units | None = None) -> None:
        """Update the copy, if there is one, from the live model, which may be sharded in units."""
        if self._vit is self._live:
            return
        if units is None and not self._exact:
            # such modules may hold more than weights (PEFT's active adapters, loralib's `merged`)
            self._vit = self._live
            self.copy()
            return
        mine, theirs = self._vit.model, self._live.model
        if units is None:
            for target, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                target.copy_(source)
        else:
            copies = dict(zip(theirs.modules(), mine.modules(), strict=True))
            for unit, members in units.members.items():
                with units.gathered(unit):
                    for member in members:
                        for name, source in member.named_parameters(recurse=False):
                            getattr(copies[member], name).copy_(source)
        for target, source in zip(mine.buffers(), theirs.buffers(), strict=True):
            target.copy_(source)

    def embed(self, images: Tensor, site: str) -> Tensor:
        """Images [B, C, H, W] → the tensor at the site."""
        with frozen(self._vit.model):
            return self._vit.embed(images.to(self.dtype), site)

    def logits(self, tokens: Tensor, site: str) -> Tensor:
        """The tensor at the site → logits [B, K]."""
        with frozen(self._vit.model):
            return self._vit.logits(tokens.to(self.dtype), site)

    def input_gradient(
        self,
        tokens: Tensor,
        site: str,
        cotangent: Callable[[Tensor, slice], tuple[Tensor, ...]],
        by_image: bool = False,
        sum_every: int | None = None,
    ) -> tuple[Tensor, ...]:
        """As ExplicitEncoder.input_gradient; `cotangent` is called once, with all logits, whatever `by_image` is.

        Raises:
            NoGradientError: the model's forward interrupts the gradient.
        """
        with frozen(self._vit.model), torch.enable_grad():
            leaf = tokens.detach().to(self.dtype).requires_grad_(True)
            logits = self._vit.logits(leaf, site)
            given, *aux = cotangent(logits.detach(), slice(0, len(tokens)))
            gradient = None
            if logits.requires_grad:  # maybe only because of a tensor that is not a parameter
                (gradient,) = torch.autograd.grad(logits, leaf, given, allow_unused=True)
            if gradient is None:
                raise NoGradientError
        if sum_every is not None:
            wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            gradient = gradient.unflatten(0, (-1, sum_every)).sum(1, dtype=wide)
        return logits.detach(), gradient, *aux

    def token_shape(self, site: str) -> tuple[int, int] | None:
        """None: the model itself checks its tokens."""
        return None

    def buffers(self) -> list[object]:
        """None: autograd allocates its memory in each call."""
        return []

    def memory(self) -> dict[str, int]:
        """Nothing is held."""
        return {"weights": 0, "kept": 0, "scratch": 0}
