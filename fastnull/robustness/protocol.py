"""The protocol of a measurement: which images, which weights, and whether a file of results was made under it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastnull.checks import check_images
from fastnull.robustness.attacks.base import model_dtype
from fastnull.vit import unwrap

Batches = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]
"""() → batches of (images, labels, indices), the same ones in the same order each time."""

DIGEST_IMAGES = 32


def open_data(data: Any, batch_size: int, limit: int | None, device: torch.device) -> tuple[Batches, int | None]:
    """The batches on `device`, and the number of images, None where the data cannot tell.

    Raises:
        TypeError: data of an unknown kind. ValueError: no images, a DataLoader that shuffles, pixels outside [0, 1].
    """
    total: int | None = None
    loader: Iterable[Any]
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        images, labels = data
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be classes [{len(images)}], one an image; got shape {list(labels.shape)}")
        total = len(images)
        loader = [(images[i : i + batch_size], labels[i : i + batch_size]) for i in range(0, total, batch_size)]
    elif isinstance(data, DataLoader):
        if isinstance(data.sampler, RandomSampler):
            raise ValueError("data must come in a fixed order; this DataLoader shuffles (set shuffle=False)")
        loader = data
        if hasattr(data.dataset, "__len__") and not data.drop_last:
            total = len(data.dataset)
    elif isinstance(data, Dataset) and hasattr(data, "__len__"):
        loader = DataLoader(data, batch_size=batch_size)
        total = len(data)
    else:
        raise TypeError(
            f"data must be a pair of tensors (images, labels), a data set with a length or a DataLoader; "
            f"got {type(data).__name__}"
        )
    if total is not None and limit is not None:
        total = min(total, limit)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        seen = 0
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"data must yield pairs (images, labels); got {type(batch).__name__}")
            images, labels = batch
            check_images(images)
            if limit is not None:
                images, labels = images[: limit - seen], labels[: limit - seen]
            indices = torch.arange(seen, seen + len(images), device=device)
            seen += len(images)
            if len(images):
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True), indices
            if limit is not None and seen >= limit:
                return

    if next(batches(), None) is None:
        raise ValueError("data must hold at least one image; got none")
    return batches, total


def data_digest(batches: Batches) -> str:
    """Of the first 32 images, rounded to 8 bits, and their labels: tells data sets apart at a small price."""
    digest = hashlib.blake2b(digest_size=8)
    left = DIGEST_IMAGES
    for images, labels, _ in batches():
        for image, label in zip(images[:left], labels[:left], strict=True):
            digest.update(f"{list(image.shape)} {label.tolist()}".encode())
            digest.update(image.detach().float().mul(255).round().clamp(0, 255).byte().cpu().numpy().tobytes())
        left -= len(images)
        if left <= 0:
            break
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Of all parameters and buffers: two checkpoints must not share a file of results."""
    digest = hashlib.blake2b(digest_size=8)
    model = unwrap(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def normalisation(model: nn.Module) -> dict[str, list[float] | None]:
    """The mean and std that a NormalizedModel holds; None where the model does not say."""
    model = unwrap(model)
    return {
        name: values.flatten().tolist() if isinstance(values := getattr(model, name, None), Tensor) else None
        for name in ("mean", "std")
    }


def dtype_name(model: nn.Module, device: torch.device) -> str:
    """Dtype of the model's weights, and of autocast where the caller has it on."""
    name = str(model_dtype(model) or torch.get_default_dtype()).removeprefix("torch.")
    if torch.is_autocast_enabled(device.type):
        return f"{name}, autocast {str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')}"
    return name


def resumed(out: str | os.PathLike[str], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The record in `out`, if it was made under this protocol."""
    try:
        record = json.loads(Path(out).read_text(encoding="utf-8"))
        old = record["protocol"]
        if not isinstance(record["results"], dict):
            raise TypeError("results are no table")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} is no result of evaluate(): {error!r}; remove it or set resume=False") from error
    wanted = json.loads(json.dumps(protocol))
    unknown = {"provenance"} | ({"n"} if wanted["n"] is None else set())
    different = [
        f"{key} ({old.get(key)!r} there, {wanted.get(key)!r} now)"
        for key in sorted((old.keys() | wanted.keys()) - unknown)
        if old.get(key) != wanted.get(key)
    ]
    if different:
        raise ValueError(
            f"{out} was made under another protocol: {'; '.join(different)}. "
            "Give another file, or set resume=False to start anew"
        )
    return record
