"""Keeps decoded images in memory if they fit, instead of decoding them for each batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastnull.data.batch_view import RandomView
from fastnull.data.sources import Samples
from fastnull.progress import progress_bar
from fastnull.rng import carried

CACHES = ("auto", "ram", "device", "none")
AUTO_PART = {"device": 1 / 4, "ram": 1 / 2}
"""Largest fraction of the free memory of the GPU or the computer that `auto` uses."""
LARGEST = 2
"""Largest side of training images that are stored unchanged, in multiples of the model's image size."""
RESIZED = 8 / 7
"""Side of training images that are stored resized, in multiples of the model's image size: 256 for 224 pixels."""
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 4 * 2**30  # bytes of free memory assumed if the system does not report it


@dataclass(frozen=True)
class Cache:
    """Where decoded images are stored.

    Attributes:
        place: ram or device; none: images are decoded for each batch.
        about: size of the cache, or why there is none, for messages.
        view: makes training views; None without a cache.
        size: height and width of the training images in memory.
        resized: whether the originals have other sizes.
    """

    place: str
    about: str
    view: RandomView | None = None
    size: tuple[int, int] = (0, 0)
    resized: bool = False

    def __str__(self) -> str:
        images = f", images of {self.size[0]}x{self.size[1]} pixels{' (resized)' * self.resized}" if self.view else ""
        return f"{self.place} ({self.about}{images})"


def plan_cache(
    cache: str,
    train: Samples,
    held_out: Samples | None,
    view: RandomView | None,
    device: torch.device,
    processes: int = 1,
    several_sizes: bool = False,
) -> Cache:
    """Choose where to store the images, from the size of the first one and the free memory.

    Args:
        cache: one of CACHES. `auto` stores images only unchanged (all of one size, up to LARGEST), within AUTO_PART of
            the free memory. `ram` and `device` also resize images.
        train, held_out: image files with their transforms.
        view: view of the training images; None: their transforms cannot be applied to batches.
        device: device of the model. On a CPU `device` is `ram`.
        processes: number of processes on this computer, each of which stores all images.
        several_sizes: whether the images are known to have several sizes.

    Raises:
        ValueError: `ram` or `device` for transforms that cannot be applied to batches, or for images that do not fit.
    """
    asked = cache in ("ram", "device")
    if cache == "none":
        return Cache("none", "as asked")
    if view is None:
        if not asked:
            return Cache("none", "auto_augment, reprob and this model's interpolation work on single images")
        raise ValueError(
            f"cache={cache!r} does not work with auto_augment, reprob or interpolations other than bilinear and "
            "bicubic, which work on single images: use 'auto' or 'none'"
        )
    image, _ = train.read(0)
    size = (image.height, image.width)
    resized = several_sizes or any(side > LARGEST * own for side, own in zip(size, view.size, strict=True))
    if resized:
        if not asked:
            return Cache("none", "images are large or of several sizes; cache='ram' would resize them")
        size = (round(RESIZED * view.size[0]), round(RESIZED * view.size[1]))
    pixels = len(train) * size[0] * size[1]
    pixels += 0 if held_out is None else len(held_out) * view.size[0] * view.size[1]
    needed = pixels * len(image.getbands())
    on_gpu = device.type == "cuda"
    for place in ("device", "ram") if on_gpu and not asked else (cache,) if on_gpu else ("ram",):
        free = torch.cuda.mem_get_info(device)[0] if place == "device" else free_memory() // processes
        if needed <= free * (1 if asked else AUTO_PART[place]):
            return Cache(place, f"{needed / 1e6:.1f} MB", view, size, resized)
    problem = f"{needed / 1e9:.3g} GB of images for {free / 1e9:.3g} GB of free memory"
    if not asked:
        return Cache("none", problem)
    raise ValueError(f"cache={cache!r}: {problem}; use cache='none', or fewer or smaller images")


def keep(
    cache: Cache, train: Samples, held_out: Samples | None, device: torch.device, show: bool = True
) -> tuple[CachedImages, Samples | CachedImages | None] | None:
    """Decode all images in threads: training images according to `cache`, held-out ones with their transform.

    Returns:
        training and held-out images; None if the training images have several sizes and `cache` does not resize them.
    """
    height, width = cache.size

    def stored(image: Any) -> Any:
        import numpy
        from PIL import Image

        if image.size != (width, height):
            if not cache.resized:
                raise _OtherSizeError
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = numpy.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def decoded(samples: Samples, convert: Callable[[Any], Any], view: RandomView | None) -> CachedImages:
        images, sizes, labels = _decoded(samples, convert, show)
        return CachedImages(images.to(device if cache.place == "device" else "cpu"), sizes, labels, view, device)

    try:
        found = decoded(train, stored, cache.view)
    except _OtherSizeError:
        return None
    if held_out is None or held_out.transform is None:  # tensors
        return found, held_out
    return found, decoded(held_out, held_out.transform, None)


@dataclass
class CachedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory. A DataLoader fetches them in batches.

    Args:
        images: bytes [n, C, H, W], on any device.
        sizes: height and width of the originals [n, 2].
        targets: class indices [n].
        view: makes random views; None: images are used as they are.
        batch_device: device of the batches.
    """

    images: Tensor
    sizes: Tensor
    targets: Tensor
    view: RandomView | None
    batch_device: torch.device

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Bytes [B, C, H, W] and (on the CPU) labels [B] of indices, or of (index, epoch) with the same epoch."""
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        indices = torch.tensor([index for index, _ in pairs])
        images = carried(self.images[indices.to(self.images.device)], self.batch_device)
        if self.view is not None:
            images = self.view(images, self.sizes[indices], indices, pairs[0][1])
        return images, self.targets[indices]


class _OtherSizeError(Exception):
    """An image differs in size from the first one."""


def _decoded(samples: Samples, convert: Callable[[Any], Any], show: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes [n, C, H, W] of all images after `convert`, sizes [n, 2] of the originals, and labels [n]."""
    count = len(samples)
    images = torch.empty(count, *convert(samples.read(0)[0]).shape, dtype=torch.uint8)
    sizes, labels = torch.empty(count, 2, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    arrays = (images.numpy(), sizes.numpy(), labels.numpy())  # writing to tensors is slower than decoding small images

    def decode(part: range) -> int:
        for index in part:
            image, label = samples.read(index)
            for array, value in zip(arrays, (convert(image), (image.height, image.width), label), strict=True):
                array[index] = value
        return len(part)

    parts = [range(first, min(first + 64, count)) for first in range(0, count, 64)]
    with progress_bar(count, show=show, desc="decoding") as bar, ThreadPoolExecutor(_cores()) as pool:
        try:
            for done in pool.map(decode, parts):
                bar.update(done)
        finally:  # do not wait for the other parts after an error or Ctrl-C
            pool.shutdown(cancel_futures=True)
    return images, sizes, labels


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that this process can still use: the minimum over the system and its control group."""
    found = []
    with suppress(OSError):  # not Linux
        found.append(1024 * _value(Path("/proc/meminfo"), "MemAvailable:"))
    with suppress(OSError, ValueError):  # no control group, or no limit ("max")
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # memory of cached files is reclaimable
        found.append(limit - used + _value(_CONTROL_GROUP / "memory.stat", "inactive_file"))
    return min(found, default=_UNKNOWN)


def _value(file: Path, name: str) -> int:
    """The number in a line `name number ...`; 0 if there is no such line."""
    lines = map(str.split, file.read_text().splitlines())
    return next((int(line[1]) for line in lines if line[0] == name), 0)
