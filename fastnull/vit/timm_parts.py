"""timm's VisionTransformer as ViTParts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastnull.vit.parts import BlockParts, UnsupportedModelError, ViTParts, need

GELU = {"GELU": "none", "GELUTanh": "tanh"}


def timm_parts(network: nn.Module) -> ViTParts:
    """The parts of a VisionTransformer (ViT, DeiT with and without distillation, DINOv2, SigLIP without map pooling).

    Raises:
        UnsupportedModelError: names the first part that is not standard.
    """
    stem = network.patch_embed
    need(not network.dynamic_img_size and stem.img_size is not None, "dynamic_img_size")
    need(isinstance(stem.proj, nn.Conv2d) and stem.proj.kernel_size == stem.proj.stride, "an overlapping patch stem")
    need(not getattr(stem, "dynamic_img_pad", False), "dynamic_img_pad")
    need(isinstance(stem.norm, nn.Identity), "a norm inside patch_embed")
    need(network.attn_pool is None and network.global_pool in ("token", "avg"), f"global_pool {network.global_pool!r}")
    distilled = hasattr(network, "head_dist")
    need(isinstance(network.head, nn.Linear), f"a head of type {type(network.head).__name__}")
    heads = [(0, network.head), (1, network.head_dist)] if distilled else [(0, network.head)]
    # the distilled model has no fc_norm in its forward
    fc_norm = None if distilled else _norm(network.fc_norm, "fc_norm")
    return ViTParts(
        projection=stem.proj,
        positions=lambda: _positions(network),
        norm_pre=_norm(network.norm_pre, "norm_pre"),
        blocks=[_block(block, index) for index, block in enumerate(network.blocks)],
        norm=_norm(network.norm, "norm"),
        pool=network.global_pool,
        pool_start=0 if network.pool_include_prefix else network.num_prefix_tokens,
        fc_norm=fc_norm,
        heads=heads,
    )


def _norm(module: nn.Module, name: str) -> nn.LayerNorm | None:
    if isinstance(module, nn.Identity):
        return None
    need(isinstance(module, nn.LayerNorm), f"{name} of type {type(module).__name__}")
    return module


def _block(block: nn.Module, index: int) -> BlockParts:
    where = f"blocks[{index}]"
    need(type(block).__name__ == "Block", f"{where} of type {type(block).__name__}")
    attn: Any = block.attn
    mlp: Any = block.mlp
    need(type(attn).__name__ == "Attention", f"{where}.attn of type {type(attn).__name__}")
    need(isinstance(attn.norm, nn.Identity) and attn.gate is None, f"{where}.attn with norm or gate")
    need(type(mlp).__name__ == "Mlp", f"{where}.mlp of type {type(mlp).__name__}")
    need(isinstance(mlp.norm, nn.Identity), f"{where}.mlp with norm")
    need(isinstance(mlp.fc1, nn.Linear), f"{where}.mlp with convolutions")
    activation = type(mlp.act).__name__
    need(activation in GELU, f"{where}.mlp with {activation}")
    norms = _norm(block.norm1, f"{where}.norm1"), _norm(block.norm2, f"{where}.norm2")
    if norms[0] is None or norms[1] is None:
        raise UnsupportedModelError(f"{where} without norms")
    approximate = "tanh" if getattr(mlp.act, "approximate", "none") == "tanh" else GELU[activation]
    return BlockParts(
        norm1=norms[0],
        qkv=attn.qkv,
        q_norm=_norm(attn.q_norm, f"{where}.attn.q_norm"),
        k_norm=_norm(attn.k_norm, f"{where}.attn.k_norm"),
        heads=attn.num_heads,
        scale=attn.scale,
        proj=attn.proj,
        gamma1=getattr(block.ls1, "gamma", None),
        norm2=norms[1],
        fc1=mlp.fc1,
        gelu=approximate,
        fc2=mlp.fc2,
        gamma2=getattr(block.ls2, "gamma", None),
    )


def _positions(network: nn.Module) -> tuple[Tensor, Tensor]:
    tokens = [network.cls_token, getattr(network, "dist_token", None), getattr(network, "reg_token", None)]
    like = network.patch_embed.proj.weight
    prefix = torch.cat([token[0] for token in tokens if token is not None] or [like.new_zeros(0, like.shape[0])])
    if network.pos_embed is None:
        return prefix, like.new_zeros(network.patch_embed.num_patches, like.shape[0])
    positions = network.pos_embed[0]
    if network.no_embed_class:
        return prefix, positions
    return prefix + positions[: len(prefix)], positions[len(prefix) :]
