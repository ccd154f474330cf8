"""open_clip's vision towers (`model.visual`). Their output, the image embedding, is used as logits."""

from __future__ import annotations

from torch import nn

from fastnull.vit.base import SplitViT, unwrapped
from fastnull.vit.hooked import HookedViT
from fastnull.vit.timm_hooked import TimmHooked
from fastnull.vit.timm_vit import TimmViT

TOWERS = ("VisionTransformer", "TimmModel")
"""Classes of open_clip: its own tower, and a timm model with a projection (SigLIP)."""


class OpenClipViT(HookedViT):
    """The tower `model.visual` of a CLIP model.

    Raises:
        ValueError: a tower around a timm model without patch embedding, such as a ResNet.
    """

    def __init__(self, model: nn.Module) -> None:
        network, _ = unwrapped(model)
        if not hasattr(network, "trunk"):
            super().__init__(model, "conv1", "ln_pre", num_prefix_tokens=1)
            return
        trunk = _split_trunk(network.trunk)
        names = {module: name for name, module in network.named_modules()}
        super().__init__(
            model, names[trunk.patch_module], _block0_name(trunk, names), num_prefix_tokens=trunk.num_prefix_tokens
        )

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Whether the network is a vision tower of open_clip."""
        return any(
            kind.__module__.startswith("open_clip.") and kind.__name__ in TOWERS for kind in type(network).__mro__
        )


def _block0_name(trunk: SplitViT, names: dict[nn.Module, str]) -> str | None:
    try:
        return names[trunk.site_module("block0")]
    except ValueError:
        return None


def _split_trunk(trunk: nn.Module) -> SplitViT:
    for adapter in (TimmViT, TimmHooked):
        if adapter.supports(trunk):
            return adapter(trunk)
    raise ValueError(f"no adapter splits {type(trunk).__name__}, the trunk of this tower: it has no patch embedding")
