"""fastnull: finetune Vision Transformers with noise they cannot see, and make them robust.

The public names below load on first use, so that `import fastnull` and `import fastnull.augment` need torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fastnull.augment import NullspaceAugment
    from fastnull.encoder.frozen import FrozenEncoder
    from fastnull.finetune.config import FinetuneConfig
    from fastnull.models import create_model
    from fastnull.noise import Noise
    from fastnull.nullspace.patch import PatchNullspace
    from fastnull.synthesis.config import SynthesisConfig
    from fastnull.synthesis.run import synthesize
    from fastnull.vit.base import NormalizedModel
else:
    __getattr__, __dir__ = lazy_names(
        __name__, "fastnull.vit.base", "fastnull.noise", "fastnull.models", "fastnull.nullspace.patch",
        "fastnull.encoder.frozen", "fastnull.synthesis.config", "fastnull.synthesis.run", "fastnull.augment",
        "fastnull.finetune.config",
    )  # fmt: skip

__all__ = [
    "FinetuneConfig", "FrozenEncoder", "Noise", "NormalizedModel", "NullspaceAugment", "PatchNullspace",
    "SynthesisConfig", "__version__", "create_model", "synthesize",
]  # fmt: skip
