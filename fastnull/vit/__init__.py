"""Taking a Vision Transformer apart: images → patch embedding → encoder → logits. One adapter a library."""

from fastnull.vit.base import SITES, NormalizedModel, SplitViT, frozen, split, unwrap
from fastnull.vit.hooked import HookedViT
from fastnull.vit.pooled import PooledClassifier

__all__ = ["SITES", "HookedViT", "NormalizedModel", "PooledClassifier", "SplitViT", "frozen", "split", "unwrap"]
