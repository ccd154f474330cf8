"""Taking a Vision Transformer apart: images → patch embedding → encoder → logits. One adapter a library."""

from fastnull.vit.base import SITES, NormalizedModel, SplitViT, frozen, split, unwrap

__all__ = ["SITES", "NormalizedModel", "SplitViT", "frozen", "split", "unwrap"]
