"""The protocol of a measurement: which images, which weights, and whether a file of results was made under it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.robustness.attacks.base import model_dtype
from fastnull.robustness.batches import EvaluationData
from fastnull.vit import unwrap

DIGEST_IMAGES = 32


def data_digest(data: EvaluationData) -> str:
    """Of the first 32 images, rounded to 8 bits, and their labels: tells data sets apart at a small price."""
    digest = hashlib.blake2b(digest_size=8)
    left = DIGEST_IMAGES
    for images, labels, *_ in data.batches():
        for image, label in zip(images[:left], labels[:left], strict=True):
            digest.update(f"{list(image.shape)} {label.tolist()}".encode())
            digest.update(image.detach().float().mul(255).round().clamp(0, 255).byte().cpu().numpy().tobytes())
        left -= len(images)
        if left <= 0:
            break
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Of the values of a tensor."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(values, digest_size=8).hexdigest()


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
        record.setdefault("images", {})
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
