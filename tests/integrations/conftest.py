"""Lightning's two packages, and a check of the weights that noise is computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnull.augment import NullspaceAugment
from fastnull.vit.base import logits_of
from tests.integrations.models import LIGHTNING, lightning_of


@pytest.fixture(params=LIGHTNING)
def lightning(request: pytest.FixtureRequest) -> Any:
    """(the library, our callback for it)."""
    return lightning_of(request.param)


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
