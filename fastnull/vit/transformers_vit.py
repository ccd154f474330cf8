"""Hugging Face transformers: image classifiers whose `embeddings` module holds the patch embedding."""

from __future__ import annotations

from torch import nn

from fastnull.vit.base import unwrapped
from fastnull.vit.hooked import HookedViT
from fastnull.vit.parts import ViTParts
from fastnull.vit.pooled import PooledClassifier
from fastnull.vit.transformers_parts import transformers_parts

PATCH_NAMES = ("embeddings.patch_embeddings", "embeddings.patch_embedding")


class TransformersViT(HookedViT):
    """Any `...ForImageClassification` with patches, or a backbone such as DINOv3 in a PooledClassifier.

    `block0` is the output of `embeddings`, or with CLIP of the norm after it.
    """

    def __init__(self, model: nn.Module) -> None:
        network, _ = unwrapped(model)
        patch = _patch_name(network)
        assert patch is not None
        embeddings = patch.rpartition(".")[0]
        base = embeddings.rpartition(".")[0]
        self.base = network.get_submodule(base)
        block0 = f"{base}.pre_layrnorm".lstrip(".") if hasattr(self.base, "pre_layrnorm") else embeddings
        super().__init__(model, patch, block0, num_prefix_tokens=_prefix_tokens(network.get_submodule(embeddings)))

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Whether the network is a transformers model with patches, or a PooledClassifier around one."""
        model = network.backbone if isinstance(network, PooledClassifier) else network
        theirs = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
        return theirs and _patch_name(network) is not None

    def parts(self) -> ViTParts:
        return transformers_parts(self.network, self.base, self.projection, self.image_size)


def _patch_name(network: nn.Module) -> str | None:
    return next((name for name, _ in network.named_modules() if name.endswith(PATCH_NAMES)), None)


def _prefix_tokens(embeddings: nn.Module) -> int:
    single = ("cls_token", "class_embedding", "distillation_token")
    registers = getattr(embeddings, "register_tokens", None)
    count = sum(getattr(embeddings, name, None) is not None for name in single)
    return count + (0 if registers is None else registers.shape[1])
