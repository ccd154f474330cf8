"""timm's VisionTransformer and its descendants (ViT, DeiT with and without distillation, DINOv2, SigLIP, CLIP)."""

from __future__ import annotations

from torch import Tensor, nn

from fastnull.vit.base import SplitViT


class TimmViT(SplitViT):
    """Follows `VisionTransformer.forward_features` and `forward_head` step by step, so results are bitwise the same.

    With `dynamic_img_size` timm's patch embedding returns [B, H, W, D]; patch tokens then keep that shape.
    """

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        super().__init__(model, network)
        self.patch_module = network.patch_embed
        self.block0_module = network.norm_pre
        self.projection = network.patch_embed.proj
        self.num_classes = network.num_classes
        # the projection of a hybrid sees the features of its CNN, not the image
        self.channels = getattr(network.patch_embed, "in_chans", self.projection.in_channels)
        fixed = not network.dynamic_img_size and network.patch_embed.img_size is not None
        self.image_size = tuple(network.patch_embed.img_size) if fixed else None
        self.num_prefix_tokens = network.num_prefix_tokens

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Whether the network has every part that the chain below calls."""
        parts = ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm", "forward_head")
        from_vit = any(base.__name__ == "VisionTransformer" for base in type(network).__mro__)
        return from_vit and all(hasattr(network, part) for part in parts) and hasattr(network.patch_embed, "proj")

    def patch(self, images: Tensor) -> Tensor:
        return self.network.patch_embed(self.normalize(images))

    def prepare(self, patches: Tensor) -> Tensor:
        return self.network.norm_pre(self.network.patch_drop(self.network._pos_embed(patches)))

    def encode(self, tokens: Tensor) -> Tensor:
        return self.network.norm(self.network.blocks(tokens))

    def head(self, features: Tensor) -> Tensor:
        return self.network.forward_head(features)
