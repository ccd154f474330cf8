"""Models and images of the suites: real architectures, random weights, random data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnull.bench import BenchSettings
from fastnull.data import digits, to_pixels
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.models import create_model
from fastnull.rng import generator
from fastnull.vit import split

LIMIT = 1.0
"""The noise starts in U(−LIMIT, LIMIT), token units."""


def make_model(name: str, settings: BenchSettings) -> nn.Module:
    """A model with weights loud enough that noise moves its logits: timm's own start (std 0.02) hardly lets it, and
    then the gradient's direction is rounding, in every implementation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = create_model(name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim > 1 and "pos_embed" not in key:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.to(settings.device).eval().requires_grad_(False)


def make_images(model: nn.Module, count: int, settings: BenchSettings, key: int = 0) -> Tensor:
    """[count, C, H, W] in [0, 1], float32."""
    vit = split(model)
    assert vit.image_size is not None, "the suites use models of one image size"
    shape = (count, vit.channels, *vit.image_size)
    return torch.rand(shape, generator=generator(settings.seed, 1, key)).to(settings.device)


def make_start(model: nn.Module, settings: BenchSettings) -> Tensor:
    """The start of a noise at site `patch`, [N, D], float32."""
    vit = split(model)
    shape = vit.parts().positions()[1].shape
    return ((2 * torch.rand(shape, generator=generator(settings.seed, 2)) - 1) * LIMIT).to(settings.device)


def trained_digits(settings: BenchSettings) -> tuple[nn.Module, Tensor]:
    """The digits ViT after 12 epochs, and images that it was trained on [N, 3, 16, 16]."""
    config = FinetuneConfig(
        augment="none", epochs=12, lr=2e-3, warmup_epochs=2, seed=settings.seed, device=settings.device, progress=False
    )
    images = to_pixels(digits(16)[0].tensors[0])
    return finetune(config).model.eval().requires_grad_(False), images.to(settings.device)
