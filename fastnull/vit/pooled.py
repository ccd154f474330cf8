"""A classifier for transformers backbones without one, such as DINOv3."""

from __future__ import annotations

from torch import Tensor, nn


class PooledClassifier(nn.Module):
    """A new linear layer on the pooled output of a backbone, for models without a `...ForImageClassification`.

    Args:
        backbone: takes images [B, C, H, W], returns an output with `.pooler_output` [B, D], and has a configuration
            with `hidden_size` D: DINOv3ViTModel, Dinov2Model, CLIPVisionModel, SiglipVisionModel and others.
        num_classes: K.
    """

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self.num_classes = num_classes
        self.classifier = nn.Linear(backbone.config.hidden_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, K]."""
        return self.classifier(self.backbone(images).pooler_output)
