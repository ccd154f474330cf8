"""Finding the adapter for a model."""

from __future__ import annotations

from torch import nn

from fastnull.vit.base import SplitViT, unwrapped, wrappers_are_plain
from fastnull.vit.open_clip_vit import OpenClipViT
from fastnull.vit.timm_hooked import TimmHooked
from fastnull.vit.timm_vit import TimmViT
from fastnull.vit.torchvision_vit import TorchvisionViT
from fastnull.vit.transformers_vit import TransformersViT
from fastnull.vit.whole import WholeModel


def split(model: nn.Module) -> SplitViT:
    """Find the adapter for a model of timm, transformers, torchvision or open_clip.

    Raises:
        TypeError: not an nn.Module.
        ValueError: unknown model or no patch embedding; the message lists what is supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    network, _ = unwrapped(model)
    theirs = type(network).__module__.startswith("timm.") or hasattr(network, "_pos_embed")
    if theirs and TimmViT.supports(network) and wrappers_are_plain(model):
        return TimmViT(model)
    # these compare class names and import no library
    for adapter in (TransformersViT, TorchvisionViT, OpenClipViT, TimmHooked):
        if adapter.supports(network):
            return adapter(model)
    raise ValueError(
        f"no adapter splits {type(network).__name__} into patch embedding, encoder and head. Supported are timm's "
        "models with a patch_embed, transformers' image classifiers with patches, torchvision's vit_* and open_clip's "
        "vision towers (model.visual). For another one name its modules, fastnull.vit.HookedViT(model, patch='...', "
        "block0='...'), or implement fastnull.vit.SplitViT (patch, prepare, encode, head), and pass that instead of "
        "the model. Noise in pixels (site='pixels') needs no adapter"
    )


def as_split(model: nn.Module | SplitViT, site: str = "patch") -> SplitViT:
    """`model` if it is an adapter already, else the adapter from `split`. Site `pixels` needs none: WholeModel."""
    if isinstance(model, SplitViT):
        return model
    try:
        return split(model)
    except ValueError:
        if site != "pixels":
            raise
        return WholeModel(model)
