"""Data for finetuning: embedded digits and photos, folders of images and timm's datasets, in a resumable order.

The order is keyed by (seed, epoch) and the augmentation of a sample by (seed, epoch, index), so a batch depends neither
on the number of workers nor on whether the run was resumed.

Images are pixels in [0, 1], or bytes, which `to_pixels` divides by 255 on the device. The model normalises them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.data.image_files import ImageFiles, ImageFolder, to_pixels
    from fastnull.data.sources import (
        EMBEDDED,
        Embedded,
        EpochBatches,
        Samples,
        Source,
        digits,
        embedded,
        evaluation_data,
        hold_out,
        keyed,
        loader,
        open_source,
        seed_everything,
    )
    from fastnull.data.view import View
else:
    __getattr__, __dir__ = lazy_names(
        __name__, "fastnull.data.sources", "fastnull.data.image_files", "fastnull.data.view"
    )

__all__ = [
    "EMBEDDED",
    "Embedded",
    "EpochBatches",
    "ImageFiles",
    "ImageFolder",
    "Samples",
    "Source",
    "View",
    "digits",
    "embedded",
    "evaluation_data",
    "hold_out",
    "keyed",
    "loader",
    "open_source",
    "seed_everything",
    "to_pixels",
]
