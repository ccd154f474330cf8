"""A small smooth classifier for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.vit import NormalizedModel

CLASSES = 7


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> NormalizedModel:
    """A convolution, GELU and two linear layers: smooth, so that gradients are informative everywhere."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 4, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, CLASSES)
    )
    with torch.no_grad():
        network[-1].weight *= 8  # margins of a trained model
    return NormalizedModel(network.to(dtype), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]).eval()


class Returning(nn.Module):
    """A model whose logits are changed, or wrapped, by a function."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.inner(images))
