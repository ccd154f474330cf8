"""Models without tokens, such as ResNet and ConvNeXt: they only take noise in pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastnull.vit.base import SplitViT


class WholeModel(SplitViT):
    """A model that is not split, for site `pixels`.

    Raises:
        ValueError: it has no convolution, so the number of image channels is unknown.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        first = next((module for module in self.network.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None:
            raise ValueError(f"{type(self.network).__name__} has no convolution, so it takes no images")
        self.projection = first
        self.channels = first.in_channels
        self.image_size = None
        self.num_classes = getattr(self.network, "num_classes", 0)
        self.num_prefix_tokens = 0

    def _without_tokens(self, *_: Any) -> Any:
        raise ValueError(f"{type(self.network).__name__} has no tokens: its only site is 'pixels'")

    site_module = patch = prepare = encode = head = _without_tokens  # type: ignore[assignment]

    def logits(self, tokens: Tensor, site: str) -> Tensor:
        return self.whole(tokens) if site == "pixels" else self._without_tokens()
