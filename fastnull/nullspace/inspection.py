"""Rank and nullity of models' patch embeddings."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import check_finite
from fastnull.compat import import_timm
from fastnull.models import check_types, create_model, read_state_dict
from fastnull.nullspace.patch import PatchNullspace, patch_projection
from fastnull.vit.base import NormalizedModel, SplitViT, unwrap
from fastnull.vit.pooled import PooledClassifier
from fastnull.vit.split import as_split

_SEED = 0  # makes the singular values of random weights repeatable

LIBRARIES = ("transformers", "torchvision", "open_clip")
"""Libraries besides timm whose models `inspect_models` takes by name: `library:name`."""

_COLUMNS = {
    "model": "model",
    "patch": "patch",
    "tokens": "tokens",
    "values": "C·p²",
    "width": "D",
    "rank": "rank",
    "nullity": "nullity",
    "fraction": "fraction",
    "per_channel_nullity": "per channel",
    "smallest_kept": "σ_r/σ_1",
    "tolerance": "tolerance",
    "mean": "mean",
    "std": "std",
    "weights": "weights",
}


def inspect_models(
    names: Sequence[str],
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
) -> list[dict[str, Any]]:
    """Measure the exact nullspaces of the patch embeddings of models, one row per name.

    Unless weights are given, models are built on the meta device and only the first layer gets (random) values. This
    shows the nullity that the shape guarantees, and takes about a second for any size of model.

    Args:
        names: as for `create_model`; or `torchvision:vit_b_16`, `open_clip:ViT-B-32`, or `transformers:FOLDER` with a
            folder that holds a config.json (or a name of the hub), for noise in the units of the model's input.
        pretrained: measure timm's weights, which are downloaded.
        checkpoint: measure the weights in this local file; for one name only.
        tolerance: see PatchNullspace.

    Returns:
        Rows with `model`, `weights` (random, pretrained or the file), `reason` (why nothing can be measured, or None),
        `mean` and `std` (pixels in [0, 1] → network input), `image_size` (height, width), and, None if there is a
        reason: `patch` (height, width), `tokens` (patches per image), `channels`, `values` (C·ph·pw, the values of a
        patch), `width` (D), `rank`, `nullity`, `fraction` (nullity / values), `per_channel_nullity` (the sum of the
        nullities of each channel's own matrix, as in the published code; at most `nullity`), `tolerance` (relative),
        `largest` singular value and `smallest_kept` (the smallest one counted in the rank, relative to the largest).

    Raises:
        TypeError: names is a string.
        ValueError: an unknown name, a checkpoint for several names, or pretrained for a model that is not timm's.
        ModuleNotFoundError: the library of a name is not installed.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a list of model names; got the string {names!r}")
    if checkpoint is not None and len(names) != 1:
        raise ValueError(f"checkpoint belongs to one model; got {len(names)} names")
    return [_inspect(name, pretrained, checkpoint, tolerance) for name in names]


def inspect_model(
    model: nn.Module | SplitViT, name: str | None = None, *, tolerance: float | None = None
) -> dict[str, Any]:
    """Measure the exact nullspace of a model with its current weights.

    Args:
        model: any that `fastnull.vit.split` supports, or an adapter; in a NormalizedModel noise is in pixels of [0, 1].
        name: of the row; None takes the network's class.
        tolerance: see PatchNullspace.

    Returns:
        A row of `inspect_models` with `weights` `given`. Without normalisation `mean` is 0 and `std` 1; if the model
        takes several sizes, `image_size` and `tokens` are None.

    Raises:
        TypeError: not a model.
    """
    whole = unwrap(model.model if isinstance(model, SplitViT) else model)
    network = unwrap(whole.network) if isinstance(whole, NormalizedModel) else whole
    mean, std = [0.0], [1.0]
    if isinstance(whole, NormalizedModel):
        mean, std = whole.mean.flatten().tolist(), whole.std.flatten().tolist()
    try:
        size = as_split(model).image_size
    except ValueError:  # no adapter: the row gives the reason
        size = None
    row = _empty_row(name or type(network).__name__, "given", size, mean, std)
    try:
        space = PatchNullspace.from_model(model, tolerance=tolerance)
    except ValueError as error:
        return {**row, "reason": str(error)}
    return row | _measured(space, size)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `inspect_models` as an aligned Markdown table, followed by the models that could not be measured."""
    measured = [row for row in rows if row["reason"] is None]
    lines = []
    if measured:
        cells = [list(_COLUMNS.values()), *([_cell(key, row[key]) for key in _COLUMNS] for row in measured)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]  # names left, numbers right
        for row in (cells[0], rule, *cells[1:]):
            padded = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("| " + " | ".join(padded) + " |")
    reasons = [f"{row['model']}: {row['reason']}" for row in rows if row["reason"] is not None]
    return "\n".join([*lines, *([""] if lines and reasons else []), *reasons])


def _inspect(
    name: str, pretrained: bool, checkpoint: str | os.PathLike[str] | None, tolerance: float | None
) -> dict[str, Any]:
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained and checkpoint exclude each other: both give weights")
    if name.partition(":")[0] in LIBRARIES:
        return _inspect_other(name, pretrained, checkpoint, tolerance)
    with torch.device("cpu" if pretrained else "meta"):
        model = create_model(name, pretrained=pretrained)
    config = model.network.pretrained_cfg
    weights = str(checkpoint) if checkpoint is not None else "pretrained" if pretrained else "random"
    row = _empty_row(name, weights, config["input_size"][1:], config["mean"], config["std"])
    try:
        projection = patch_projection(model)
    except ValueError as error:
        return {**row, "reason": str(error)}
    if not pretrained:
        _materialize(model.network, projection, checkpoint)
        model.mean, model.std = (torch.tensor(row[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return row | _measured(PatchNullspace.from_model(model, tolerance=tolerance), row["image_size"])


def _inspect_other(
    name: str, pretrained: bool, checkpoint: str | os.PathLike[str] | None, tolerance: float | None
) -> dict[str, Any]:
    library, _, rest = name.partition(":")
    if pretrained:
        raise ValueError(f"pretrained takes timm's weights; for {name} give a local file of weights as checkpoint")
    import_timm()  # if torchvision does not match torch, the three cannot be imported without this
    build = {"transformers": _transformers, "torchvision": _torchvision, "open_clip": _open_clip}[library]
    with torch.device("meta"):
        model = build(rest)
    try:
        projection = patch_projection(model)
    except ValueError:
        return inspect_model(model, name)  # a row with the reason
    _materialize(model, projection, checkpoint)
    weights = str(checkpoint) if checkpoint is not None else "random"
    return {**inspect_model(model, name, tolerance=tolerance), "weights": weights}


def _transformers(name: str) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"transformers reads no configuration from {name!r}: {reason}") from error
    try:
        return transformers.AutoModelForImageClassification.from_config(config)
    except ValueError:  # a backbone without a classifier
        return PooledClassifier(transformers.AutoModel.from_config(config), num_classes=1)


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise ValueError(
            f"torchvision knows no model named {name!r}; its ViTs are {', '.join(list_models(include='vit_*'))}"
        )
    return get_model(name, weights=None)


def _open_clip(name: str) -> nn.Module:
    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.0)
        raise ValueError(f"open_clip knows no model named {name!r}; nearest are {', '.join(near)}")
    return open_clip.create_model(name, pretrained=None, load_weights=False, device="meta").visual


def _empty_row(
    name: str, weights: str, size: Sequence[int] | None, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    return {
        "model": name,
        "weights": weights,
        "reason": None,
        "mean": list(mean),
        "std": list(std),
        "image_size": None if size is None else tuple(size),
        **dict.fromkeys(
            ("patch", "tokens", "channels", "values", "width", "rank", "nullity", "fraction", "per_channel_nullity")
        ),
        **dict.fromkeys(("tolerance", "largest", "smallest_kept")),
    }


def _measured(space: PatchNullspace, size: tuple[int, int] | None) -> dict[str, Any]:
    """The measured part of a row; `size` (height, width) gives the number of patches."""
    values = space.dim + space.rank
    kept = float(space.singular_values[space.rank - 1] / space.singular_values[0]) if space.rank else None
    tokens = None
    if size is not None:
        tokens = math.prod(side // patch for side, patch in zip(size, space.patch_size, strict=True))
    return {
        "patch": space.patch_size,
        "tokens": tokens,
        "channels": space.channels,
        "values": values,
        "width": space.width,
        "rank": space.rank,
        "nullity": space.dim,
        "fraction": space.dim / values,
        "per_channel_nullity": _per_channel_nullity(space),
        "tolerance": space.tolerance,
        "largest": float(space.singular_values[0]),
        "smallest_kept": kept,
    }


def _materialize(network: nn.Module, projection: nn.Conv2d, checkpoint: str | os.PathLike[str] | None) -> None:
    """Give the first layer of a model on the meta device the checkpoint's values, or random ones, on the CPU."""
    projection.to_empty(device="cpu")
    if checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            projection.reset_parameters()
        return
    key = next(name for name, module in network.named_modules() if module is projection) + ".weight"
    weight = read_state_dict(checkpoint).get(key)
    if weight is None or weight.shape != projection.weight.shape:
        found = "nothing" if weight is None else f"shape {list(weight.shape)}"
        raise ValueError(f"{checkpoint}: {key} must have shape {list(projection.weight.shape)}; the file holds {found}")
    check_types({key: weight}, {key: projection.weight}, checkpoint)
    check_finite(f"{checkpoint}: {key}", weight)
    projection.weight = nn.Parameter(weight, requires_grad=False)


def _per_channel_nullity(space: PatchNullspace) -> int:
    """Sum over channels of the nullity of the channel's own [D, ph·pw] matrix, with the same relative tolerance."""
    total = 0
    for matrix in space.weight.chunk(space.channels, dim=1):
        values: Tensor = torch.linalg.svdvals(matrix)
        total += matrix.shape[1] - int((values > space.tolerance * values[0]).sum())
    return total


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "patch":
        return "x".join(map(str, value))
    if key == "fraction":
        return f"{100 * value:.1f} %"
    if key in ("smallest_kept", "tolerance"):
        return f"{value:.1e}"
    if key in ("mean", "std"):
        return " ".join(f"{x:.3g}" for x in value)
    return str(value)
