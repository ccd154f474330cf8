"""timm's models with a `patch_embed` that are not a plain VisionTransformer: EVA, BEiT, CaiT, Swin, XCiT and others,
and a VisionTransformer with foreign hooks or replaced methods."""

from __future__ import annotations

from torch import nn

from fastnull.vit.base import unwrapped
from fastnull.vit.hooked import HookedViT

BLOCK0 = {"VisionTransformer": "norm_pre", "Eva": "norm_pre", "Beit": "pos_drop", "Cait": "pos_drop"}
"""Class or base class → the module whose output enters the first block. Hierarchical models have none."""


class TimmHooked(HookedViT):
    """Any timm model with a `patch_embed`; tokens keep its output shape ([B, h, w, D] in Swin)."""

    def __init__(self, model: nn.Module) -> None:
        network, _ = unwrapped(model)
        block0 = next((BLOCK0[kind.__name__] for kind in type(network).__mro__ if kind.__name__ in BLOCK0), None)
        # CaiT adds its class token after its blocks
        prefix = 0 if type(network).__name__ == "Cait" else getattr(network, "num_prefix_tokens", 0)
        super().__init__(model, "patch_embed", block0, num_prefix_tokens=prefix)

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Whether the network is timm's and has a patch embedding."""
        theirs = any(kind.__module__.startswith("timm.") for kind in type(network).__mro__)
        stem = getattr(network, "patch_embed", None)
        # CrossViT has a list of two
        return theirs and isinstance(stem, nn.Module) and not isinstance(stem, nn.ModuleList)
