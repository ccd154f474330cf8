"""The protocol of a measurement: digests of images and weights, and the check of a result file against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import as_type
from fastnull.ops.common import in_autocast
from fastnull.record import read_json
from fastnull.robustness.attacks.base import model_dtype
from fastnull.robustness.batches import EvaluationData
from fastnull.robustness.settings import BALL_ATTACKS
from fastnull.vit import unwrap

DIGEST_IMAGES = 32
AS_GIVEN = "none: the images as given, pixels in [0, 1]"
"""`transform` of images that have none. Earlier files have it for image folders too, so protocols are told apart by the
digest of the images instead."""


def data_digest(data: EvaluationData) -> str:
    """Digest of the first 32 images, rounded to 8 bits, and their labels."""
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
    """Digest of the values of a tensor."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(values, digest_size=8).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Digest of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=8)
    model = unwrap(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def normalisation(model: nn.Module) -> dict[str, list[float] | None]:
    """The mean and std that a NormalizedModel holds; None if the model has none."""
    model = unwrap(model)
    return {
        name: values.flatten().tolist() if isinstance(values := getattr(model, name, None), Tensor) else None
        for name in ("mean", "std")
    }


def dtype_name(model: nn.Module, device: torch.device) -> str:
    """Dtype of the model's weights, and of autocast if it is enabled."""
    name = str(model_dtype(model) or torch.get_default_dtype()).removeprefix("torch.")
    if in_autocast(device):
        return f"{name}, autocast {str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')}"
    return name


_NUMBERS = ("clean", "clean_top5", "cw", "patch")
_BY_CORRUPTION = ("corruptions", "imagenet-c", "cifar10-c")
_RADIUS = re.compile(r"[0-9.]+(e-?[0-9]+)?(/255)?")
_PARTIAL = {"measurement": str, "position": int, "images": int, "top1": int, "top5": int, "skipped": list}


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of `evaluate` and check the types of all its parts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result of `evaluate`; the message names the file and the wrong part.
    """
    try:
        record = read_json(path)
        for name in ("protocol", "results", "summary"):
            if name not in record:
                raise ValueError(f"it lacks {name}")
            as_type(name, record[name], Mapping[str, Any])
        for name, value in record["results"].items():
            _check_result(f"results[{name!r}]", name, value)
        as_type("summary", record["summary"], Mapping[str, float | None])
        for name, about in as_type("images", record.setdefault("images", {}), Mapping[str, Any]).items():
            as_type(f"images[{name!r}]", about, Mapping[str, int | list])
        if "partial" in record:
            partial = as_type("partial", record["partial"], Mapping[str, Any])
            for name, kind in _PARTIAL.items():
                as_type(f"partial[{name!r}]", partial.get(name), kind)
    except (TypeError, ValueError) as error:
        why = str(error).removeprefix(f"{os.fspath(path)} ")
        raise ValueError(f"{os.fspath(path)} is not a result of evaluate(): {why}") from error
    return record


def _check_result(where: str, name: str, value: Any) -> None:
    if name in BALL_ATTACKS:
        for radius in as_type(where, value, Mapping[str, float]):
            if not _RADIUS.fullmatch(radius):
                raise ValueError(f'{where} must have radii such as "8/255" or "0.5"; it has {radius!r}')
    elif name in _BY_CORRUPTION:
        for corruption, severities in as_type(where, value, Mapping[str, Mapping[str, float]]).items():
            if not severities:
                raise ValueError(f"{where}[{corruption!r}] must hold a severity; it is empty")
    elif name in _NUMBERS:
        as_type(where, value, float)
    else:
        as_type(where, value, float | Mapping[str, float])


def resumed(out: str | os.PathLike[str], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The record in `out`; ValueError if it was made under another protocol."""
    try:
        record = read_result(out)
    except ValueError as error:
        raise ValueError(f"{error}; remove it or set resume=False") from error
    old = record["protocol"]
    wanted = json.loads(json.dumps(protocol))
    unknown = {"provenance"} | ({"n"} if wanted["n"] is None else set())
    if old.get("transform") == AS_GIVEN:
        unknown.add("transform")
    different = [
        f"{key} ({old.get(key)!r} there, {wanted.get(key)!r} now)"
        for key in sorted((old.keys() | wanted.keys()) - unknown)
        if old.get(key) != wanted.get(key)
    ]
    if different:
        raise ValueError(
            f"{out} was made under another protocol: {'; '.join(different)}. "
            "Give another file, or set resume=False to start again"
        )
    old["transform"] = wanted["transform"]
    return record
