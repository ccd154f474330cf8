"""The data and the model of a run, tested on one image of each data set."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from fastnull.checks import as_labels, check_images
from fastnull.data.cache import Cache, CachedImages, keep, plan_cache
from fastnull.data.classes import (
    classes_of,
    match_classes,
    model_names,
    names_of,
    shortened,
    warn_of_assumed_order,
)
from fastnull.data.image_files import to_pixels
from fastnull.data.sources import Samples, Source, embedded, hold_out, open_source
from fastnull.data.view import View
from fastnull.distributed.processes import Processes
from fastnull.finetune.config import FinetuneConfig
from fastnull.vit import NormalizedModel, unwrap

Data: TypeAlias = "Dataset[Any] | Sequence[Any]"


@dataclass(frozen=True)
class Prepared:
    """Data and model of a run; `num_classes` logits of these `classes`; `cache`: where image files are kept."""

    model: nn.Module
    train: Samples | CachedImages
    validation: Samples | CachedImages | None
    num_classes: int
    classes: list[str] | None
    cache: Cache | None = None


def prepare(
    config: FinetuneConfig,
    device: torch.device,
    model: nn.Module | None = None,
    train_data: Data | None = None,
    val_data: Data | None = None,
) -> Prepared:
    """Open the data, create the model and test it on one image. Arguments and errors are those of `finetune`."""
    source = _source(config, train_data)
    if source.classes is not None and len(source.classes) < 2:
        raise ValueError(f"training data must have at least two classes; it has only {shortened(source.classes)}")
    learned = model is not None or config.pretrained or config.checkpoint is not None
    model = (_create_model(config, source) if model is None else model).to(device)
    if learned and source.classes is not None and not getattr(unwrap(model), "new_head", False):
        warn_of_assumed_order(classes_of(model), source.classes)  # a new head learns any order
    labels = _match_classes(model, source)
    train, validation = _datasets(config, source, labels, val_data, model)
    num_classes = _try_out(model, train, validation, device)
    if num_classes < 2:
        raise ValueError(f"the model must have at least two classes to learn; its logits have {num_classes}")
    check_start(config, model)
    known = classes_of(model)
    return Prepared(model, train, validation, num_classes, known if isinstance(known, list) else source.classes)


def check_start(config: FinetuneConfig, model: nn.Module) -> None:
    """Raise ValueError if start_fraction would average with a head that is not trained."""
    if config.start_fraction and getattr(unwrap(model), "new_head", False):
        raise ValueError("start_fraction mixes in the weights at the start, but their head is new: train it first")


def head_is_trained(model: nn.Module) -> None:
    """Record that a new head has been trained."""
    inner = unwrap(model)
    if isinstance(inner, NormalizedModel):
        inner.new_head = False


def cache_of(
    config: FinetuneConfig, ready: Prepared, device: torch.device, processes: Processes, *, several_sizes: bool = False
) -> Cache | None:
    """Where the image files of a run are to be kept; None for tensors. Raises ValueError as `plan_cache`."""
    if not isinstance(ready.train, Samples) or ready.train.transform is None:
        return None
    assert not isinstance(ready.validation, CachedImages)
    view = View.of(ready.model).batched(config.seed, **config.image_settings())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.world))
    own = plan_cache(config.cache, ready.train, ready.validation, view, device, here, several_sizes)
    # processes must agree, because files and cache have other random numbers
    return next((plan for plan in processes.gathered(own) if plan.view is None), own)


def keep_images(config: FinetuneConfig, ready: Prepared, device: torch.device, processes: Processes) -> Prepared:
    """`ready` with its image files decoded in memory, where `config.cache` says so. Raises as `cache_of`."""
    for several_sizes in (False, True):
        cache = cache_of(config, ready, device, processes, several_sizes=several_sizes)
        if config.progress and processes.first and cache is not None:
            print(f"cache: {cache}", file=sys.stderr)
        if cache is None or cache.view is None:
            break
        kept = keep(cache, ready.train, ready.validation, device, config.progress and processes.first)
        if kept is not None:
            return replace(ready, train=kept[0], validation=kept[1], cache=cache)
    return replace(ready, cache=cache)


def _source(config: FinetuneConfig, train_data: Data | None) -> Source:
    if train_data is None:
        return open_source(config.data, data_dir=config.data_dir, download=config.download)
    data = _as_dataset("train_data", train_data)
    names = names_of(data)
    return Source(data, config.num_classes if names is None else len(names), names)


def _create_model(config: FinetuneConfig, source: Source) -> nn.Module:
    from fastnull.models import create_model

    num_classes = config.num_classes or source.num_classes
    if num_classes is None:
        raise ValueError("num_classes is needed: the data does not define the number of classes")
    # not every architecture has drop path
    regularised: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    model = create_model(
        config.model,
        num_classes=num_classes,
        pretrained=config.pretrained,
        checkpoint=config.checkpoint,
        img_size=config.img_size,
        **regularised,
    )
    if model.classes is None or source.classes is None:
        return model
    try:
        match_classes(model.classes, source.classes)
    except ValueError:
        warnings.warn(
            f"{config.checkpoint}: its head is for other classes ({shortened(model.classes)}); the head "
            f"for {shortened(source.classes)} is initialised randomly",
            UserWarning,
            stacklevel=4,
        )
        model.network.reset_classifier(num_classes)
        model.classes, model.new_head = None, True
    return model


def _match_classes(model: nn.Module, source: Source) -> list[int] | None:
    """The label of each class of the data; a model without class names gets them from the data."""
    if source.classes is None:
        return None
    labels = match_classes(classes_of(model), source.classes, name="the training data")
    inner = unwrap(model)
    if isinstance(inner, NormalizedModel):
        inner.classes = model_names(classes_of(model), source.classes)
    return labels


def _datasets(
    config: FinetuneConfig, source: Source, labels: list[int] | None, val_data: Data | None, model: nn.Module
) -> tuple[Samples, Samples | None]:
    """Training images with random transforms, held-out ones with those of evaluation; tensors are unchanged."""
    if not source.transforms and (config.auto_augment or config.reprob):
        raise ValueError("auto_augment and reprob are for image files; these images are tensors")
    augmented = plain = channels = None
    train = source.train
    if train is None:
        train = embedded(config.data, model)[0]
    elif source.transforms:
        view = View.of(model)
        augmented, plain, channels = (
            view.training(**config.image_settings()),
            view.evaluation(),
            view.channels,
        )
    if val_data is not None:
        held_out = _as_dataset("val_data", val_data)
        names = names_of(held_out)
        known = classes_of(model)
        if names is None:
            matched = labels  # numbered as in the training data
        else:
            matched = match_classes(known if isinstance(known, list) else source.classes, names, name="val_data")
        return Samples(train, augmented, channels, config.seed, labels), Samples(held_out, classes=matched)
    kept, held = hold_out(train, config.val_fraction, config.val_seed)
    validation = None if held is None else Samples(held, plain, channels, config.seed, labels)
    return Samples(kept, augmented, channels, config.seed, labels), validation


def _as_dataset(name: str, data: Data) -> Dataset[Any]:
    if isinstance(data, (tuple, list)) and data and hasattr(data[0], "dtype"):  # a pair of arrays, not of samples
        data = _pair(name, data)
    if isinstance(data, DataLoader) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"{name} must be a dataset with a length and an index, or a pair of tensors; got {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError(f"{name} must hold at least one image; it is empty")
    return data  # type: ignore[return-value]


def _pair(name: str, pair: Sequence[Any]) -> TensorDataset:
    """(images, labels), each a tensor, an array or a list, as a dataset."""
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair of tensors, images and labels; got {len(pair)}")
    try:
        images, labels = (torch.as_tensor(part) for part in pair)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a pair of tensors, images and labels: {error}") from error
    if images.ndim == 0 or labels.ndim == 0 or len(images) != len(labels):
        raise ValueError(
            f"{name} must hold a label for each image; got images {list(images.shape)}, labels {list(labels.shape)}"
        )
    return TensorDataset(images, labels)


@torch.no_grad()
def _try_out(model: nn.Module, train: Samples, validation: Samples | None, device: torch.device) -> int:
    """Run the model on one image of each set, before anything is written; return its number of classes."""
    classes = _classes(model, "training", *_first(train, "training"), device)
    if validation is not None:
        _classes(model, "held-out", *_first(validation, "held-out"), device)
    return classes


def _first(data: Samples, which: str) -> tuple[Tensor, Any]:
    sample = data.base[0]
    if not isinstance(sample, Sequence) or len(sample) != 2:
        what = f"{len(sample)} values" if isinstance(sample, Sequence) else type(sample).__name__
        raise TypeError(f"the {which} data must yield pairs (image, label); got {what}")
    return data[0]


def _classes(model: nn.Module, which: str, image: Tensor, label: Any, device: torch.device) -> int:
    """Number of logits for an image [C, H, W], after a check of its label."""
    if not isinstance(image, Tensor):
        raise TypeError(f"the {which} images must be tensors [C, H, W]; got {type(image).__name__}")
    images = to_pixels(image.unsqueeze(0), device)
    # a grey image would pass without the check, because mean and standard deviation broadcast
    channels = model.mean.shape[1] if isinstance(model, NormalizedModel) else None
    check_images(images, name=f"{which} images", channels=channels)
    training = model.training
    try:
        logits = model.eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"the model does not take the {which} images {list(image.shape)}: {error}") from error
    finally:
        model.train(training)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TypeError(f"model must return logits [B, K]; got {type(logits).__name__}")
    as_labels(default_collate([label]), logits.shape[1], 1, name=f"{which} labels")
    return logits.shape[1]
