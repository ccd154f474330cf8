"""Data for finetuning: embedded digits and photos, folders of images, timm's datasets, in an order that can be resumed.

Every random draw on the way to a batch is keyed: the order by (seed, epoch), a sample's augmentation by
(seed, epoch, index). A batch is therefore the same whoever loads it, the main process or any number of workers, and
whether or not the run was stopped before it.

Images are pixels in [0, 1], or bytes, which `to_pixels` divides by 255 on the device: the mean and the standard
deviation belong to the model.
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
