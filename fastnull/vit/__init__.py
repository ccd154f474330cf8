"""Vision Transformers split into patch embedding, encoder and head; one adapter per library."""

from fastnull.vit.base import SITES, NormalizedModel, SplitViT, frozen, unwrap
from fastnull.vit.hooked import HookedViT
from fastnull.vit.pooled import PooledClassifier
from fastnull.vit.split import split

__all__ = ["SITES", "HookedViT", "NormalizedModel", "PooledClassifier", "SplitViT", "frozen", "split", "unwrap"]
