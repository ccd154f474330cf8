"""open_clip's vision towers (`model.visual`); their output, the image embedding, takes the place of logits."""

from __future__ import annotations

from torch import nn

from fastnull.vit.hooked import HookedViT


class OpenClipViT(HookedViT):
    """`VisionTransformer` of open_clip. Of a whole CLIP model pass `model.visual`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "conv1", "ln_pre", num_prefix_tokens=1)

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Whether the network is a vision tower of open_clip."""
        return any(
            kind.__module__.startswith("open_clip.") and kind.__name__ == "VisionTransformer"
            for kind in type(network).__mro__
        )
