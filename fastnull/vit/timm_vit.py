"""timm's VisionTransformer and its descendants (ViT, DeiT with and without distillation, DINOv2, SigLIP, CLIP)."""

from __future__ import annotations

from torch import Tensor, nn

from fastnull.vit.base import SplitViT, under_adapters
from fastnull.vit.parts import ViTParts
from fastnull.vit.timm_parts import timm_parts


class TimmViT(SplitViT):
    """Follows `VisionTransformer.forward_features` and `forward_head` step by step; results are bitwise the same.

    With `dynamic_img_size` patch tokens have the shape [B, H, W, D].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        network = self.network
        self.patch_module = network.patch_embed
        self.block0_module = network.norm_pre
        self.projection = under_adapters(network.patch_embed.proj)
        self.num_classes = network.num_classes
        # the input of a hybrid's projection is not the image
        self.channels = getattr(network.patch_embed, "in_chans", self.projection.in_channels)
        fixed = not network.dynamic_img_size and network.patch_embed.img_size is not None
        self.image_size = tuple(network.patch_embed.img_size) if fixed else None
        self.num_prefix_tokens = network.num_prefix_tokens

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Whether the network is a VisionTransformer with timm's own forward."""
        from timm.models.vision_transformer import VisionTransformer

        # a subclass with its own forward would be split wrongly
        kind = type(network)
        return (
            isinstance(network, VisionTransformer)
            and kind.forward_features is VisionTransformer.forward_features
            and kind.forward is VisionTransformer.forward
            and hasattr(network.patch_embed, "proj")
        )

    def parts(self) -> ViTParts:
        return timm_parts(self.network)

    def patch(self, images: Tensor) -> Tensor:
        return self.network.patch_embed(self.normalize(images))

    def prepare(self, patches: Tensor) -> Tensor:
        return self.network.norm_pre(self.network.patch_drop(self.network._pos_embed(patches)))

    def encode(self, tokens: Tensor) -> Tensor:
        return self.network.norm(self.network.blocks(tokens))

    def head(self, features: Tensor) -> Tensor:
        return self.network.forward_head(features)
