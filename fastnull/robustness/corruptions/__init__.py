"""The 15 + 4 corruptions of ImageNet-C (Hendrycks and Dietterich 2019), as torch code on [0, 1] pixels in memory.

Formulas and constants are the original's. Lengths are in pixels and were chosen for 224 x 224, so blurs are stronger
on small images, and elastic_transform (in units of 244 px) makes sense only near 224. (CIFAR-10-C and Tiny-ImageNet-C
use milder constants for 32 and 64 px.) Results differ from those of the published files, which were rounded to 8 bits
and saved as JPEG of quality 85; two corruptions used ImageMagick, and frost used photographs. Report them as in-memory
corruptions.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnull.checks import check_choice, check_images
from fastnull.rng import KeyedRandom
from fastnull.robustness.corruptions import blur, digital, noise, weather
from fastnull.robustness.corruptions.base import Corruption
from fastnull.robustness.corruptions.frost import MADE_BY_US, frost, read_pictures

CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "spatter": weather.spatter,
    "contrast": digital.contrast,
    "saturate": digital.saturate,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
"""Name → function (images, severity, random). Add a function to register it."""

DEMO_CORRUPTIONS = ("gaussian_noise", "impulse_noise", "gaussian_blur", "contrast", "brightness", "pixelate")
"""Six that make sense from 16 pixels upwards and need torch alone."""

SEVERITIES = (1, 2, 3, 4, 5)

CACHED_VALUES = 1 << 21


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    indices: Tensor | Sequence[int] | None = None,
    frost_folder: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Corrupt a batch. The result depends only on the image, its index, name, severity and seed.

    Args:
        images: [B, C, H, W], pixels in [0, 1], 16 x 16 or larger.
        name: one of CORRUPTIONS.
        severity: 1 (mild) to 5.
        seed: of the randomness.
        indices: [B] integers that identify the images in their data set; None: 0 .. B-1.
        frost_folder: pictures for `frost`; None: those that the package generates.

    Returns:
        [B, C, H, W] within [0, 1], in the images' dtype and on their device (computed in float32).

    Raises:
        ValueError: unknown name (the message suggests one), severity outside 1..5, images outside [0, 1] or too small,
            not one index per image, a number of channels that the corruption does not support, or a
            frost_folder without pictures.
        ImportError: jpeg_compression without Pillow, spatter without OpenCV.
    """
    check_choice("corruption", name, CORRUPTIONS)
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"severity must be one of 1, 2, 3, 4, 5; got {severity!r}")
    check_images(images)
    if min(images.shape[2:]) < 16:
        raise ValueError(f"images must be 16x16 pixels or larger; got {images.shape[2]}x{images.shape[3]}")
    if indices is None:
        indices = torch.arange(len(images))
    numbers = torch.as_tensor(indices, dtype=torch.int64, device=images.device)
    if numbers.shape != images.shape[:1]:
        raise ValueError(f"indices must hold one entry per image ({len(images)}); got shape {list(numbers.shape)}")
    if len(images) == 0:
        return images.clone()
    # as many images at once as fit in the processor's caches
    at_once = len(images)
    if images.device.type == "cpu":
        at_once = max(1, CACHED_VALUES // max(images[0].numel(), 256 * 256))  # fog draws 256 x 256 numbers per image
    function = CORRUPTIONS[name]
    if name == "frost" and frost_folder is not None:
        function = functools.partial(frost, pictures=_pictures(os.fspath(frost_folder)))
    results = []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for some, theirs in zip(images.split(at_once), numbers.split(at_once), strict=True):
            random = KeyedRandom(seed, f"{name}/{severity}", theirs)
            changed = function(some.float().clamp(0, 1), int(severity), random)
            results.append(changed.clamp(0, 1).to(images.dtype))
    return torch.cat(results)


@functools.lru_cache(maxsize=1)
def _pictures(folder: str) -> tuple[Tensor, ...]:
    return read_pictures(folder)


def frost_source(frost_folder: str | os.PathLike[str] | None) -> str:
    """The source of the frost pictures, with a digest of the user's own, for the protocol of a result."""
    if frost_folder is None:
        return MADE_BY_US
    digest = hashlib.blake2b(digest_size=8)
    pictures = _pictures(os.fspath(frost_folder))
    for picture in pictures:
        digest.update(f"{list(picture.shape)}".encode() + picture.numpy().tobytes())
    return f"{len(pictures)} pictures of the user ({digest.hexdigest()})"
