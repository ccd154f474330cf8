"""fastnull: finetune Vision Transformers with noise they cannot see, and make them robust.

The public names below load on first use, so that `import fastnull` and `import fastnull.augment` need torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "PatchNullspace": "fastnull.nullspace",
    "FrozenEncoder": "fastnull.encoder",
    "Noise": "fastnull.synthesis",
    "SynthesisConfig": "fastnull.synthesis",
    "synthesize": "fastnull.synthesis",
    "NullspaceAugment": "fastnull.augment",
    "FinetuneConfig": "fastnull.finetune",
    "NormalizedModel": "fastnull.vit",
    "create_model": "fastnull.models",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastnull' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
