"""The small classifier and images for it. 16 x 16: the smallest size that is supported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnull.vit import NormalizedModel
from tests.robustness.small_model import make_model


@pytest.fixture
def model() -> NormalizedModel:
    return make_model()


@pytest.fixture
def batch(model: NormalizedModel) -> tuple[Tensor, Tensor]:
    """32 images and the classes the model gives them. A power of two: dividing a loss by it is exact."""
    images = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(1)


@pytest.fixture
def photos() -> Tensor:
    """Crops of a photograph, [6, 3, 48, 64]: natural statistics, not square. Sides have factors 2 and 3 only."""
    data = pytest.importorskip("skimage.data")
    picture = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255
    return torch.stack([picture[:, 40 * i : 40 * i + 48, 60 * i : 60 * i + 64] for i in range(6)])
