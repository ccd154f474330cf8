"""The image size of a model, and the transforms from image files to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.compat import import_timm
from fastnull.data.batch_view import INTERPOLATIONS, RandomView
from fastnull.vit import split, unwrap


@dataclass(frozen=True)
class View:
    """Image size (H, W) and channels of a model, and how images are resized and cropped to it."""

    size: tuple[int, int]
    channels: int
    interpolation: str
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module) -> View:
        """The view of a timm model (in a NormalizedModel or plain); 224 pixels if the model has no size.

        Mean and std have one value per channel, converted as in `create_model`.
        """
        network = unwrap(model)
        network = unwrap(getattr(network, "network", network))
        config = import_timm().data.resolve_model_data_config(network)
        channels, *size = config["input_size"]
        try:
            adapter = split(model)
        except ValueError:  # not a ViT: only the configuration is known
            pass
        else:
            channels, size = adapter.channels, adapter.image_size or size
        # a torch.nn.Module without a pretrained_cfg gets timm's ImageNet defaults
        return cls(
            size=(int(size[0]), int(size[1])),
            channels=channels,
            interpolation=config["interpolation"],
            crop=config["crop_pct"],
            mean=per_channel(config["mean"], channels),
            std=per_channel(config["std"], channels),
        )

    def __str__(self) -> str:
        """How `evaluation` changes images, for records."""
        return f"resized (crop {self.crop:g}, {self.interpolation}), cropped to {self.size[0]}x{self.size[1]}"

    def evaluation(self) -> Callable[[Any], Tensor]:
        """Resize and centre crop; PIL image → bytes [C, H, W]."""
        return import_timm().data.create_transform(
            self.size, normalize=False, interpolation=self.interpolation, crop_pct=self.crop
        )

    def training(
        self, *, crop_scale: float, hflip: float, color_jitter: float, auto_augment: str | None, reprob: float
    ) -> Callable[[Any], Tensor]:
        """Random crop, flip, RandAugment or colour jitter, random erasing; PIL image → bytes [C, H, W].

        Operations that change only colours do not change grey images.

        Raises:
            ValueError: an auto_augment that timm does not know.
        """
        try:
            _check_policy(auto_augment)
            transform = import_timm().data.create_transform(
                self.size,
                is_training=True,
                normalize=False,
                scale=(crop_scale, 1.0),
                hflip=hflip,
                color_jitter=color_jitter or None,
                auto_augment=auto_augment,
                interpolation=self.interpolation,
                mean=self.mean,
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original' or "
                f"'3a'; got {auto_augment!r} ({error})"
            ) from error
        return _Erasing(transform, reprob, self.mean, self.std) if reprob else transform

    def batched(self, seed: int, *, auto_augment: str | None, reprob: float, **settings: float) -> RandomView | None:
        """`training` for batches; None if it has no form for batches."""
        if auto_augment or reprob or self.interpolation not in INTERPOLATIONS:
            return None
        return RandomView(self.size, self.interpolation, seed=seed, **settings)


def _check_policy(policy: str | None) -> None:
    """Refuse sections without a number, which timm ignores, except RandAugment's sets (t...)."""
    for section in (policy or "").split("-")[1:]:
        if not re.search(r"\d", section) and not section.startswith("t"):
            raise ValueError(f"section {section!r} has no number")


def per_channel(values: Sequence[float], count: int) -> tuple[float, ...]:
    """Values of three colours → `count` channels, as timm converts the weights of the first layer."""
    if count == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(count))


class _Erasing:
    """timm's random erasing with normal noise per pixel, for images that are not normalised."""

    def __init__(
        self, transform: Callable[[Any], Tensor], probability: float, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.transform = transform
        self.erase = import_timm().data.random_erasing.RandomErasing(probability, mode="pixel", device="cpu")
        self.mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Any) -> Tensor:
        normalized = (self.transform(image).float() - self.mean) / self.std
        return (self.erase(normalized) * self.std + self.mean).round().clamp(0, 255).byte()
