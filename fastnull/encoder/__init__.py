"""The frozen encoder: logits and input gradients of a ViT, without weight gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.encoder.frozen import BACKENDS, Cotangent, FrozenEncoder
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.encoder.frozen")

__all__ = ["BACKENDS", "Cotangent", "FrozenEncoder"]
