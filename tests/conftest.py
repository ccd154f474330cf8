"""Fixtures for all tests: small models with random weights, images, and a fixed seed."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnull.augment import NullspaceAugment
from fastnull.compat import import_timm
from fastnull.vit import NormalizedModel
from fastnull.vit.base import logits_of

# before torchvision is imported: see import_timm
import_timm()

# the models are so small that a second thread makes them slower
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def build_vit(*, distilled: bool = False, **changes: Any) -> NormalizedModel:
    """A small timm ViT with random weights in eval mode; `distilled` adds DeiT's second token and head.

    16x16 images, patches of 4: 16 patch tokens; width 32 < 48 values per patch, so there is an exact nullspace.
    """
    import_timm()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    network = (VisionTransformerDistilled if distilled else VisionTransformer)(**{**settings, **changes})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # with timm's initialisation (0.02) noise hardly changes the logits
            if parameter.ndim > 1 and "pos_embed" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return NormalizedModel(network, [0.5] * 3, [0.5] * 3).eval()


def run_example(name: str, *words: str) -> str:
    """Run a script of examples/ and return its output."""
    script = str(Path(__file__).parents[1] / "examples" / name)
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def make_vit() -> Callable[..., NormalizedModel]:
    """The factory `build_vit`, for tests that need another shape."""
    return build_vit


@pytest.fixture
def vit() -> NormalizedModel:
    """A small ViT."""
    return build_vit()


@pytest.fixture
def images() -> Tensor:
    """Eight images [8, 3, 16, 16] in [0, 1]."""
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def watch() -> Callable[..., tuple[list[float], list[Tensor]]]:
    """(augmentation, images) → two lists that every draw adds to: the largest difference between the logits of the
    encoder that made the noise and those of the model at that time, and the model's logits."""

    def watched(aug: NullspaceAugment, images: Tensor) -> tuple[list[float], list[Tensor]]:
        gaps: list[float] = []
        seen: list[Tensor] = []
        draw = aug.draw

        def draw_and_compare(tokens: Tensor) -> Tensor:
            noise = draw(tokens)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                # a copy: this runs within a forward of the model, and a copy has no noise
                right = logits_of(copy.deepcopy(aug.encoder.vit.model).eval()(images))
                gaps.append(float((aug.encoder(aug.encoder.embed(images)) - right).abs().max()))
            seen.append(right)
            return noise

        aug.draw = draw_and_compare  # type: ignore[method-assign]
        return gaps, seen

    return watched
