"""Models by name (timm's, and `vit_digits` for demos), weights from local files, and model files.

No code from a file is run: files are safetensors, or torch files read with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import as_type, check_number
from fastnull.compat import import_timm
from fastnull.data.classes import check_names, classes_of
from fastnull.data.view import per_channel
from fastnull.record import provenance
from fastnull.tensor_files import write_tensors
from fastnull.vit.base import NormalizedModel, unwrap

FORMAT = "fastnull model 1"
"""The `format` entry in the metadata of files that `save_checkpoint` writes."""

_EMBEDDED: dict[str, dict[str, Any]] = {
    # 16 tokens of 4x4 pixels; width 32 < 48 values per patch leave an exact nullspace of 16 dimensions
    "vit_digits": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10},
    # 16 tokens too, of 8x8 pixels; width 64 < 192
    "vit_photos": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 13},
}
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first, as in timm
_PREFIXES = ("module.", "_orig_mod.", "network.")  # of DDP, torch.compile and NormalizedModel
_SHOWN = 4


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    normalize: bool = True,
    **kwargs: Any,
) -> NormalizedModel:
    """Create a model that takes pixels in [0, 1]: one of timm's, `vit_digits` (16x16 pixels, width 32, 10 classes) or
    `vit_photos` (32x32 pixels, width 64, 13 classes).

    Args:
        name: a timm architecture, with or without a pretrained tag, `vit_digits` or `vit_photos`.
        num_classes: None keeps the model's own. If given, a head of another size in the weights is replaced by a new
            one, with a warning.
        pretrained: download timm's weights.
        checkpoint: a local file with weights: .safetensors, or a torch file with a state dict, at the top level or
            under state_dict_ema, model_ema, state_dict or model (in this order).
        img_size: in pixels, (height, width) or the side. If given, position embeddings in the checkpoint are resized.
        channels: of the images; None is 3. For 1, mean and std are averaged over the three colours; for more they
            repeat.
        normalize: False passes pixels to the network unchanged (mean 0, std 1).
        kwargs: passed to timm, such as drop_path_rate.

    Returns:
        The model in training mode on the CPU. Its attribute `recipe` holds the arguments, `classes` the names of its
        classes if the checkpoint has them (`save_checkpoint`) and its head is kept, otherwise None, and `new_head`
        whether weights were loaded without the head.

    Raises:
        ValueError: unknown name (the nearest are listed), an invalid argument, or weights that are damaged, unsafe, not
            finite or of another shape.
        FileNotFoundError: no such checkpoint.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained and checkpoint exclude each other: both give weights")
    recipe = {
        "name": name,
        "num_classes": num_classes,
        "img_size": list(img_size) if isinstance(img_size, Sequence) else img_size,
        "channels": channels,
        "normalize": normalize,
        "kwargs": kwargs,
    }
    model = _build(recipe, pretrained=pretrained)
    if checkpoint is not None:
        state = read_state_dict(checkpoint)
        loaded = _load(
            model.network, state, Path(checkpoint), new_head=num_classes is not None, resize=img_size is not None
        )
        model.new_head = not loaded
        names = _stored_names(Path(checkpoint))
        # no names for a new head
        model.classes = names if names is not None and len(names) == model.recipe["num_classes"] else None
    return model


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Write a model as safetensors, with everything that `load_model` needs to rebuild it.

    Args:
        model: compile and DDP wrappers are removed. Of a model that `create_model` did not make only the network's
            weights are written, and `load_model` cannot rebuild it. Names of classes (`model.classes`, see
            fastnull.data.classes.classes_of) are included.
        path: ends in .safetensors; written atomically.
        metadata: JSON values, stored under `metadata` in the file.

    Raises:
        TypeError: `metadata` or an argument the model was created with is not a JSON value.
        ValueError: another suffix, weights that are not finite, or `model.classes` that are not one name per class.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors; got {path.name!r}")
    model = unwrap(model)
    network = unwrap(model.network) if isinstance(model, NormalizedModel) else model
    recipe = getattr(model, "recipe", None)
    about = {"metadata": metadata, "classes": getattr(network, "num_classes", None), **(recipe or {})}
    if isinstance(model, NormalizedModel):
        check_names(model.classes, getattr(network, "num_classes", None))
    names = classes_of(model)
    about["class_names"] = names if isinstance(names, list) else None
    about |= {"name": recipe["name"] if recipe else type(network).__name__, "rebuilds": recipe is not None}
    about["provenance"] = provenance(next(network.parameters()).device)
    if isinstance(model, NormalizedModel):
        about |= {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    try:
        header = {key: json.dumps(value, allow_nan=False) for key, value in about.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"the model's arguments and metadata must be plain JSON values: {error}") from error
    header["format"] = FORMAT
    tensors = network.state_dict()
    _check_finite(tensors, f"the weights for {path}")
    write_tensors(path, tensors, header)


def load_model(path: str | os.PathLike[str]) -> NormalizedModel:
    """Rebuild a model from a file of `save_checkpoint`, with its mean, std and `classes`; in float32, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of `save_checkpoint`, a damaged one, or one of a model that `create_model` did not make.
    """
    header = read_metadata(path)
    _check_header(path, header)
    if not header["rebuilds"]:
        raise ValueError(
            f"{path} holds the weights of a {header['name']} that fastnull.create_model did not make: build the model "
            "yourself and load fastnull.models.read_state_dict(path)"
        )
    recipe = {key: header[key] for key in ("name", "num_classes", "img_size", "channels", "normalize", "kwargs")}
    try:
        model = _build(recipe, pretrained=False)
    except Exception as error:  # timm raises many kinds for damaged arguments
        raise ValueError(f"{path}: its metadata describes no model: {_first_line(error)}") from error
    _load(model.network, read_state_dict(path), Path(path), new_head=False, resize=False)
    _check_normalisation(path, header["mean"], header["std"], model.mean.shape[1])
    for buffer, values in ((model.mean, header["mean"]), (model.std, header["std"])):
        buffer.copy_(torch.tensor(values).view(1, -1, 1, 1))
    model.classes = header.get("class_names")  # files of earlier versions have none
    try:
        check_names(model.classes, header["classes"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata is damaged: {error}") from error
    return model


_HEADER: dict[str, Any] = {
    "name": str, "num_classes": int | None, "img_size": int | tuple[int, ...] | None, "channels": int | None,
    "normalize": bool, "kwargs": dict[str, Any], "classes": int | None,
    "mean": tuple[float, ...], "std": tuple[float, ...],
}  # fmt: skip
"""Metadata that `load_model` reads, with types."""


def _check_header(path: str | os.PathLike[str], header: dict[str, Any]) -> None:
    """Raise ValueError unless the metadata of a file is complete and of the right types."""
    kinds = {"rebuilds": bool, **(_HEADER if header.get("rebuilds") else {"name": str})}
    missing = [key for key in kinds if key not in header]
    if missing:
        raise ValueError(f"{os.fspath(path)} is damaged: its metadata lacks {', '.join(missing)}")
    try:
        for key, kind in kinds.items():
            as_type(key, header[key], kind)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error} in its metadata") from error


def _check_normalisation(path: str | os.PathLike[str], mean: Any, std: Any, channels: int) -> None:
    """Raise ValueError unless every channel has a mean >= 0 and a standard deviation > 0."""
    for name, values, exclusive in (("mean", mean, False), ("std", std, True)):
        if not isinstance(values, Sequence) or len(values) != channels:
            raise ValueError(f"{path}: {name} must hold a number for each of {channels} channels; got {values!r}")
        for value in values:
            try:
                check_number(f"{path}: {name}", value, 0, exclusive=exclusive)
            except TypeError as error:
                raise ValueError(str(error)) from error


class ForeignFileError(ValueError):
    """A file of weights that `save_checkpoint` did not write, so it does not name its model."""


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Metadata of a file of `save_checkpoint`: name, classes (their number), class_names (a list or None), kwargs,
    mean, std, provenance and others.

    Raises:
        FileNotFoundError: no such file.
        ForeignFileError: not a file of `save_checkpoint`.
        ValueError: a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    foreign = ForeignFileError(
        f"{path} was not written by fastnull's save_checkpoint and does not name its model: use "
        "create_model(name, checkpoint=...)"
    )
    if path.suffix in _TORCH_SUFFIXES:
        raise foreign
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise foreign
    try:
        return {key: value if key == "format" else json.loads(value) for key, value in header.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is damaged: {error}") from error


def _stored_names(path: Path) -> list[str] | None:
    """The names of classes in a file of `save_checkpoint`, or None."""
    if path.suffix != ".safetensors":
        return None
    try:
        header = read_metadata(path)
        check_names(header.get("class_names"), header.get("classes"))
    except (TypeError, ValueError):  # a file of another program
        return None
    return header.get("class_names")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict in a local file, also inside the wrappers and prefixes of training scripts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a truncated one, one with pickled code, or one without weights.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        raise ValueError(f"{path}: checkpoints end in .safetensors or {', '.join(_TORCH_SUFFIXES)}")
    if isinstance(content, Mapping):
        content = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = ", ".join(map(repr, list(content)[:_SHOWN])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} holds no state dict (names → tensors), neither alone nor under {', '.join(_STATE_KEYS)}; "
            f"it holds {found or 'nothing'}"
        )
    state = {str(key): value for key, value in content.items() if key != "n_averaged"}  # a counter of AveragedModel
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _build(recipe: dict[str, Any], *, pretrained: bool) -> NormalizedModel:
    """A model with new (or timm's) weights from the arguments of `create_model`."""
    name, num_classes, channels = recipe["name"], recipe["num_classes"], recipe["channels"]
    sizes = recipe["img_size"] if isinstance(recipe["img_size"], list) else [recipe["img_size"]]
    for key, value in [("num_classes", num_classes), ("channels", channels), *(("img_size", side) for side in sizes)]:
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{key} must be an integer; got {value!r}")
            check_number(key, value, 1)
    if len(sizes) not in (1, 2):
        raise ValueError(f"img_size must be the side or (height, width); got {tuple(sizes)!r}")
    for key, instead in (("in_chans", "channels"), ("checkpoint_path", "checkpoint")):
        if key in recipe["kwargs"]:
            raise ValueError(f"{key} is timm's name; here it is {instead}=")
    timm = import_timm()
    _check_name(name, timm, pretrained)
    arguments = {
        "num_classes": num_classes,
        "in_chans": channels,
        "img_size": tuple(sizes) if len(sizes) == 2 else sizes[0],
        **recipe["kwargs"],
    }
    arguments = {key: value for key, value in arguments.items() if value is not None}
    try:
        if name in _EMBEDDED:
            network = timm.models.VisionTransformer(**{**_EMBEDDED[name], **arguments})
            side, chans = network.patch_embed.img_size, network.patch_embed.proj.in_channels
            network.pretrained_cfg = network.default_cfg = {
                "architecture": name, "input_size": (chans, *side), "mean": (0.5,) * 3, "std": (0.5,) * 3,
                "first_conv": "patch_embed.proj", "classifier": "head",
            }  # fmt: skip
        else:
            network = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take {', '.join(arguments) or 'these arguments'}: {error}") from error
    if pretrained:
        _check_finite(network.state_dict(), f"timm's weights of {name}")
    config = timm.data.resolve_model_data_config(network)
    count = channels or len(config["mean"])
    mean, std = (per_channel(config[key], count) if recipe["normalize"] else [b] * count
                 for key, b in (("mean", 0.0), ("std", 1.0)))  # fmt: skip
    model = NormalizedModel(network, mean, std)
    given = (getattr(network, "pretrained_cfg", None) or {}).get("num_classes")
    model.new_head = pretrained and given != network.num_classes
    # timm may change the number of classes of a name; 0 means no head
    model.recipe = {**recipe, "num_classes": num_classes or getattr(network, "num_classes", None) or None}
    return model


def _check_name(name: str, timm: Any, pretrained: bool) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string; got {type(name).__name__}")
    if name in _EMBEDDED:
        if pretrained:
            raise ValueError(f"there are no pretrained weights for {name}; training it takes seconds")
        return
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*_EMBEDDED, *timm.list_models()]
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"timm knows no model named {name!r}.{hint} timm.list_models('vit_*') lists them")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        near = difflib.get_close_matches(name, tagged, n=3, cutoff=0.0)
        raise ValueError(f"{architecture} has no weights tagged {tag!r}; nearest are {', '.join(near) or 'none'}")


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint file: {path}")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        # arguments of a training script, common in checkpoints: plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{path} is truncated or not a torch checkpoint: {_first_line(error)}") from error
        raise ValueError(
            f"{path} is refused: it contains a pickled {found[1]}, and unpickling can run any code. Save only the "
            "state dict, or convert the file to safetensors"
        ) from error
    except Exception as error:  # a truncated file raises many kinds
        raise ValueError(f"{path} is truncated or not a torch checkpoint: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_finite(state: Mapping[str, Tensor], where: str) -> None:
    valued = {key: value for key, value in state.items() if isinstance(value, Tensor) and not value.is_meta}
    floating = {key: value for key, value in valued.items() if value.is_floating_point()}
    # torch has no isfinite for 8-bit floats
    wide = {key: value.float() if value.itemsize == 1 else value for key, value in floating.items()}
    bad = [key for key, value in wide.items() if not bool(value.isfinite().all())]
    if bad:
        raise ValueError(f"{where}: NaN or Inf in {len(bad)} tensors: {_few(bad)}")


def check_types(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a tensor of a file is of another kind than the model's tensor of that name in `own`.

    Floating dtypes of 16 bits or more are accepted for floating weights. Integers and 8-bit floats there come from a
    quantised model whose scales are missing.
    """
    bad = [
        f"{key} is {value.dtype}{'' if value.layout is torch.strided else f' ({value.layout})'}, not {own[key].dtype}"
        for key, value in state.items()
        if key in own and (_kind(value) != _kind(own[key]) or value.layout is not torch.strided)
    ]
    if bad:
        raise ValueError(f"{path}: {len(bad)} tensors of another type than the model's: {_few(bad)}")


def _kind(value: Tensor) -> str:
    if value.is_quantized or value.is_complex() or value.is_floating_point():
        kind = "8-bit floating" if value.itemsize == 1 else "floating"
        return "quantised" if value.is_quantized else "complex" if value.is_complex() else kind
    return "bool" if value.dtype == torch.bool else "integer"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _load(network: nn.Module, state: dict[str, Tensor], path: Path, *, new_head: bool, resize: bool) -> bool:
    """Load weights of the same shapes, except for a head or position embedding whose size the user changed; returns
    whether the head was loaded."""
    own = network.state_dict()
    check_types(state, own, path)
    _check_finite(state, str(path))
    if resize and "pos_embed" in own and "pos_embed" in state and state["pos_embed"].shape != own["pos_embed"].shape:
        adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if adapt is not None:
            state = adapt(state, network)
    heads = _heads(network)
    of_head = [key for key in own if key.rpartition(".")[0] in heads]
    fresh = new_head and any(key not in state or state[key].shape != own[key].shape for key in of_head)
    if fresh:
        classes = sorted({len(state[key]) for key in of_head if key in state})
        warnings.warn(
            f"{path}: its head has {classes[0] if classes else 'no'} classes; the head for {network.num_classes} "
            "classes is newly initialised",
            UserWarning,
            stacklevel=3,
        )
        state = {**state, **{key: own[key] for key in of_head}}

    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    absent = (("missing", missing), ("unexpected", unexpected))
    faults = [f"{len(keys)} {what}: {_few(keys)}" for what, keys in absent if keys]
    if other:
        shapes = [f"{key} {list(state[key].shape)} in the file, {list(own[key].shape)} in the model" for key in other]
        faults.append(f"{len(other)} of another shape: {_few(shapes)}")
    if not faults:
        network.load_state_dict(state)
        return not fresh
    hints = []
    if any(key in of_head for key in other):
        hints.append("pass num_classes: the file's number to keep its head, or another for a new one")
    if "pos_embed" in other:
        hints.append("pass img_size to resize the position embedding")
    raise ValueError(f"{path} does not fit {type(network).__name__}: {'; '.join([*faults, *hints])}")


def _heads(network: nn.Module) -> tuple[str, ...]:
    """Names of the classifier layers."""
    names = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)
