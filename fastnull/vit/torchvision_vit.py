"""torchvision's VisionTransformer (vit_b_16 and others)."""

from __future__ import annotations

from torch import Tensor, nn

from fastnull.vit.hooked import HookedViT
from fastnull.vit.parts import BlockParts, LiveLinear, ViTParts, need


class TorchvisionViT(HookedViT):
    """Patch tokens are the output of `conv_proj`; the position embedding is added inside `encoder`, to all tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "conv_proj", "encoder.dropout", num_prefix_tokens=1)

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Whether the network is a torchvision ViT."""
        return any(
            f"{kind.__module__}.{kind.__name__}" == "torchvision.models.vision_transformer.VisionTransformer"
            for kind in type(network).__mro__
        )

    def parts(self) -> ViTParts:
        network = self.network
        need(isinstance(self.patch_module, nn.Conv2d), "a convolutional stem")
        need(len(network.heads) == 1, "a head of several layers")
        return ViTParts(
            projection=self.projection,
            positions=self._positions,
            norm_pre=None,
            blocks=[_block(block) for block in network.encoder.layers],
            norm=network.encoder.ln,
            pool="token",
            pool_start=0,
            fc_norm=None,
            heads=[(0, network.heads[0])],
        )

    def _positions(self) -> tuple[Tensor, Tensor]:
        positions = self.network.encoder.pos_embedding[0]  # [1 + N, D]
        return self.network.class_token[0] + positions[:1], positions[1:]


def _block(block: nn.Module) -> BlockParts:
    attention, mlp = block.self_attention, block.mlp
    return BlockParts(
        norm1=block.ln_1,
        qkv=LiveLinear(lambda: attention.in_proj_weight, lambda: attention.in_proj_bias),
        q_norm=None,
        k_norm=None,
        heads=attention.num_heads,
        scale=attention.head_dim**-0.5,
        proj=attention.out_proj,
        gamma1=None,
        norm2=block.ln_2,
        fc1=mlp[0],
        gelu=mlp[1].approximate,
        fc2=mlp[3],
        gamma2=None,
    )
