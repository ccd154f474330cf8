"""Models without tokens (ResNet, ConvNeXt, anything that takes images): noise in the pixels is all they can have."""

from __future__ import annotations

from torch import Tensor, nn

from fastnull.vit.base import SplitViT


class WholeModel(SplitViT):
    """A model in one piece, for site `pixels`.

    Raises:
        ValueError: there is no convolution in it that would tell the channels of its images.
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

    def site_module(self, site: str) -> nn.Module:
        raise ValueError(self._without(site))

    def patch(self, images: Tensor) -> Tensor:
        raise ValueError(self._without("patch"))

    def prepare(self, patches: Tensor) -> Tensor:
        raise ValueError(self._without("block0"))

    def encode(self, tokens: Tensor) -> Tensor:
        raise ValueError(self._without("block0"))

    def head(self, features: Tensor) -> Tensor:
        raise ValueError(self._without("block0"))

    def logits(self, tokens: Tensor, site: str) -> Tensor:
        if site != "pixels":
            raise ValueError(self._without(site))
        return self.whole(tokens)

    def _without(self, site: str) -> str:
        return f"{type(self.network).__name__} has no site {site!r}, only 'pixels': it is not split into tokens"
