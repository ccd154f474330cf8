"""The exact nullspace of a patch embedding and its uses: noise, watermarks, inspection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.nullspace.inspection import inspect_model, inspect_models
    from fastnull.nullspace.patch import PatchNullspace, patch_projection
    from fastnull.nullspace.pixels import PixelNullspace
else:
    __getattr__, __dir__ = lazy_names(
        __name__, "fastnull.nullspace.patch", "fastnull.nullspace.pixels", "fastnull.nullspace.inspection"
    )

__all__ = ["PatchNullspace", "PixelNullspace", "inspect_model", "inspect_models", "patch_projection"]
