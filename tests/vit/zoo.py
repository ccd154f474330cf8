"""One small model with random weights of every supported kind, for the support table and tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fastnull.compat import import_timm
from fastnull.vit import PooledClassifier

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 16, "patch_size": 4}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of model: its library, how people call it, and a function that builds a small one with 5 classes."""

    library: str
    name: str
    build: Callable[[], nn.Module]

    def missing(self) -> str:
        """Why the kind cannot be built here, or an empty string."""
        try:
            importlib.import_module(self.library)
        except ImportError:
            return f"{self.library} is not installed"
        except RuntimeError:  # a torchvision of another torch, which fastnull.compat handles when the model is built
            pass
        return ""

    def or_skip(self) -> Kind:
        """The kind itself; skips the test if its library is missing."""
        if self.missing():
            pytest.skip(self.missing())
        return self

    def model(self) -> nn.Module:
        """The model in eval mode with every parameter changed: initial zeros and ones would hide a missing branch."""
        import_timm()  # where torchvision does not match torch, transformers fails too without this
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()


def find(library: str, name: str) -> nn.Module:
    """A model by its library and name, or skip."""
    return next(kind for kind in KINDS if (kind.library, kind.name) == (library, name)).or_skip().model()


def _timm(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: import_timm().create_model(name, num_classes=5, **changes)


def _transformers(kind: str, size: dict[str, Any] = SIZE, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, f"{kind.split('For')[0]}Config")
        return getattr(transformers, kind)(config(**{**size, "num_labels": 5, **changes}))

    return build


# CLIP and SigLIP: the text half is not built, but its defaults would be logged
_TWO_TOWERS: dict[str, Any] = {
    "vision_config": SIZE, "text_config": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}  # fmt: skip


def _dinov3() -> nn.Module:
    transformers = importlib.import_module("transformers")
    # pos_embed_rescale is random in training
    config = transformers.DINOv3ViTConfig(**SIZE, num_register_tokens=3, pos_embed_rescale=None)
    return PooledClassifier(transformers.DINOv3ViTModel(config), 5)


def _torchvision() -> nn.Module:
    vision = importlib.import_module("torchvision.models")
    return vision.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def _open_clip() -> nn.Module:
    tower = importlib.import_module("open_clip.transformer")
    return tower.VisionTransformer(
        image_size=16, patch_size=4, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=5
    )


def _open_clip_timm() -> nn.Module:
    tower = importlib.import_module("open_clip.timm_model")
    return tower.TimmModel("test_vit", embed_dim=5, image_size=160, pool="avg", proj="linear")


_VIT: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 2}

KINDS = [
    Kind("timm", "ViT", _timm("vit_tiny_patch16_224", img_size=32, **_VIT)),
    Kind("timm", "DeiT, distilled", _timm("deit_tiny_distilled_patch16_224", img_size=32, **_VIT)),
    Kind("timm", "DINOv2, registers", _timm("vit_small_patch14_reg4_dinov2", img_size=28, **_VIT)),
    Kind("timm", "SigLIP, average pooling", _timm("vit_base_patch16_siglip_gap_224", img_size=32, **_VIT)),
    Kind("timm", "SigLIP, attention pooling", _timm("vit_base_patch16_siglip_224", img_size=32, **_VIT)),
    Kind("timm", "CLIP", _timm("vit_base_patch16_clip_224", img_size=32, **_VIT)),
    Kind("timm", "EVA-02", _timm("eva02_tiny_patch14_224", img_size=28, **_VIT)),
    Kind("timm", "DINOv3", _timm("vit_small_patch16_dinov3", img_size=32, **_VIT)),
    Kind("timm", "BEiT", _timm("beit_base_patch16_224", img_size=32, **_VIT)),
    Kind("timm", "CaiT", _timm("cait_xxs24_224", img_size=32, **_VIT)),
    Kind("timm", "Swin", _timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1, 1, 1, 1),
                               num_heads=(1, 1, 1, 1), drop_path_rate=0.0)),
    Kind("timm", "XCiT", _timm("xcit_nano_12_p16_224", img_size=32, **_VIT)),
    Kind("timm", "ResNet", _timm("resnet18")),
    Kind("timm", "ConvNeXt", _timm("convnext_atto")),
    Kind("transformers", "ViT", _transformers("ViTForImageClassification")),
    Kind("transformers", "DeiT", _transformers("DeiTForImageClassification")),
    Kind("transformers", "DeiT, distilled", _transformers("DeiTForImageClassificationWithTeacher")),
    Kind("transformers", "DINOv2", _transformers("Dinov2ForImageClassification")),
    Kind("transformers", "DINOv2, registers",
         _transformers("Dinov2WithRegistersForImageClassification", num_register_tokens=3)),
    Kind("transformers", "DINOv3", _dinov3),
    Kind("transformers", "CLIP", _transformers("CLIPForImageClassification", _TWO_TOWERS)),
    Kind("transformers", "SigLIP", _transformers("SiglipForImageClassification", _TWO_TOWERS)),
    Kind("transformers", "BEiT", _transformers("BeitForImageClassification", drop_path_rate=0.0)),
    Kind("transformers", "Swin",
         _transformers("SwinForImageClassification", {"image_size": 16, "patch_size": 2}, embed_dim=16, depths=[1, 1],
                       num_heads=[2, 2], window_size=4, drop_path_rate=0.0)),
    Kind("torchvision", "ViT", _torchvision),
    Kind("open_clip", "vision tower", _open_clip),
    Kind("open_clip", "vision tower of timm", _open_clip_timm),
]  # fmt: skip
