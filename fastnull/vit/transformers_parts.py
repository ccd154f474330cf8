"""Hugging Face classifiers as ViTParts: ViT, DeiT, DINOv2 with and without registers, SigLIP.

Module names of transformers 5.9 and of earlier versions are both supported.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.vit.parts import BlockParts, LiveLinear, UnsupportedModelError, ViTParts, need

GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}

CLASSIFIERS = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "SiglipForImageClassification",
)


def transformers_parts(
    network: nn.Module, base: nn.Module, projection: nn.Conv2d, image_size: tuple[int, int] | None
) -> ViTParts:
    """The parts of a classifier `network` with the patch embedding `projection`; `base` is it without the classifier.

    Raises:
        UnsupportedModelError: names the first part that is not standard.
    """
    # a subclass may compute anything: only the exact name identifies the forward
    kind = type(network).__name__
    if kind == "PooledClassifier":
        kind = f"{type(network.backbone).__name__} under a {kind}"
    need(kind in CLASSIFIERS, f"transformers' {kind}")
    need(image_size is not None and image_size[0] == image_size[1], "images that are not square")
    config: Any = getattr(network.config, "vision_config", network.config)
    need(config.hidden_act in GELU, f"an MLP with {config.hidden_act}")
    siglip, dinov2 = kind.startswith("Siglip"), kind.startswith("Dinov2")
    if kind.endswith("WithTeacher"):
        heads = [(0, network.cls_classifier), (1, network.distillation_classifier)]
    else:
        heads = [(0, network.classifier)]
    need(all(isinstance(linear, nn.Linear) for _, linear in heads), "a model without classifier")
    prefix = len(_positions(base.embeddings)[0])
    return ViTParts(
        projection=projection,
        positions=lambda: _positions(base.embeddings),
        norm_pre=None,
        blocks=[_block(block, config) for block in _first(base, "layers", "encoder.layer", "encoder.layers")],
        norm=_first(base, "layernorm", "post_layernorm"),
        pool="token_avg" if dinov2 else "avg" if siglip else "token",
        # Dinov2's own mean excludes its registers
        pool_start=prefix,
        fc_norm=None,
        heads=heads,
    )


def _first(module: nn.Module, *names: str) -> Any:
    """The submodule with the first name that exists."""
    for name in names:
        try:
            return attrgetter(name)(module)
        except AttributeError:
            continue
    raise UnsupportedModelError(f"{type(module).__name__} without {' or '.join(names)}")


def _block(block: nn.Module, config: Any) -> BlockParts:
    attention = _first(block, "attention", "self_attn")
    q, k, v = (
        _first(attention, f"{new}_proj", f"attention.{old}")
        for new, old in (("q", "query"), ("k", "key"), ("v", "value"))
    )
    heads = config.num_attention_heads
    return BlockParts(
        norm1=_first(block, "layernorm_before", "norm1", "layer_norm1"),
        qkv=LiveLinear.joined(q, k, v),
        q_norm=None,
        k_norm=None,
        heads=heads,
        scale=(q.out_features // heads) ** -0.5,
        proj=_first(attention, "o_proj", "out_proj", "output.dense"),
        gamma1=getattr(getattr(block, "layer_scale1", None), "lambda1", None),
        norm2=_first(block, "layernorm_after", "norm2", "layer_norm2"),
        fc1=_first(block, "mlp.fc1", "intermediate.dense"),
        gelu=GELU[config.hidden_act],
        fc2=_first(block, "mlp.fc2", "output.dense"),
        gamma2=getattr(getattr(block, "layer_scale2", None), "lambda1", None),
    )


def _positions(embeddings: nn.Module) -> tuple[Tensor, Tensor]:
    """Prefix tokens [P, D] and the position embedding of the image tokens [N, D]."""
    if hasattr(embeddings, "position_embedding"):  # SigLIP: an Embedding, no prefix
        positions = embeddings.position_embedding.weight
        return positions[:0], positions
    need(embeddings.position_embeddings is not None, "a model without position embedding")
    positions = embeddings.position_embeddings[0]
    tokens = [embeddings.cls_token, getattr(embeddings, "distillation_token", None)]
    prefix = torch.cat([token[0] for token in tokens if token is not None])
    prefix, positions = prefix + positions[: len(prefix)], positions[len(prefix) :]
    registers = getattr(embeddings, "register_tokens", None)  # without position
    return prefix if registers is None else torch.cat([prefix, registers[0]]), positions
