"""Class names: match the classes of data to the classes of a model.

Classes are matched by name if both the model and the data have names, else by order, which requires the same number of
classes.
"""

from __future__ import annotations

import functools
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from fastnull.compat import import_timm
from fastnull.vit.base import NormalizedModel, unwrap

_SHOWN = 6
_IMAGENET = 1000


def match_classes(
    model_classes: Sequence[str] | int | None, folder_classes: Sequence[str], *, name: str = "data"
) -> list[int]:
    """The index in the model of each class of some data.

    Args:
        model_classes: result of `classes_of(model)`: the names in the order of the logits, or their number, or None.
        folder_classes: class names of the data, such as its folders; they may be a subset of the model's.
        name: of the data in messages.

    Returns:
        For each of `folder_classes` the index of the model's class. If the model has no names, the order is that of
        the folders, or ImageNet's for a model of 1000 classes and folders named by WordNet ids.

    Raises:
        ValueError: a class that the model does not have, or has twice, or, without names, another number of classes.
            The message shows both lists.
    """
    known = model_names(model_classes, folder_classes, name=name)
    if known == list(folder_classes):
        return list(range(len(known)))
    places: dict[str, list[int]] = {}
    for place, held in enumerate(known):
        places.setdefault(_plain(held), []).append(place)
    unknown = [folder for folder in folder_classes if _plain(folder) not in places]
    twice = [folder for folder in folder_classes if len(places.get(_plain(folder), ())) > 1]
    if unknown or twice:
        fault = (
            f"classes that the model does not know: {shortened(unknown)}"
            if unknown
            else f"classes whose names the model has more than once: {shortened(twice)}"
        )
        raise ValueError(
            f"{name} has {fault}. Its {len(folder_classes)} classes are {shortened(folder_classes)}; "
            f"the model's {len(known)} are {shortened(known)}"
        )
    return [places[_plain(folder)][0] for folder in folder_classes]


def model_names(
    model_classes: Sequence[str] | int | None, folder_classes: Sequence[str], *, name: str = "data"
) -> list[str]:
    """Class names of a model; if it has none, the names that `match_classes` assumes for it.

    Arguments and errors are those of `match_classes`.
    """
    if isinstance(model_classes, str) or isinstance(folder_classes, str):
        raise TypeError("classes must be a list of names; got one string")
    if model_classes is None or model_classes == len(folder_classes):
        return list(folder_classes)
    if not isinstance(model_classes, int):
        return list(model_classes)
    if model_classes == _IMAGENET and folder_classes and set(folder_classes) <= set(wordnet_ids()):
        return list(wordnet_ids())
    raise ValueError(
        f"{name} has {len(folder_classes)} classes ({shortened(folder_classes)}), the model {model_classes} "
        "without names, so they cannot be matched. A model that fastnull finetuned on the data has the names; "
        "otherwise set them: model.classes = [...]"
    )


def warn_of_assumed_order(model_classes: Sequence[str] | int | None, folder_classes: Sequence[str]) -> None:
    """Warn, once for each list, if a model without names gets classes in an order that torchvision would not give them.

    Labels of another order would be wrong in silence: only the numbers of classes are compared.

    Args:
        model_classes: result of `classes_of(model)`.
        folder_classes: class names of the data in the order of its labels.
    """
    counted = model_classes is None or model_classes == len(folder_classes)
    names = list(folder_classes)
    if counted and names == sorted(names, key=class_order) and names != sorted(names):
        _warn_of_order(tuple(names))


@functools.cache
def _warn_of_order(names: tuple[str, ...]) -> None:
    plain = sorted(names)
    at = next(place for place, name in enumerate(plain) if name != names[place])
    warnings.warn(
        f"the model has no class names: its classes are assumed in timm's order of the folders, {shortened(names)}. In "
        f"torchvision's order class {at} is {printable(plain[at])}, not {printable(names[at])}. If the model has "
        "another order, set model.classes = [...]",
        UserWarning,
        stacklevel=4,
    )


def class_order(name: str) -> tuple[list[Any], str]:
    """Sort key of class folders, as timm numbers them: 2 before 10, lower case. The name itself orders Cat and cat."""
    return natural_parts(name.lower()), name


def natural_parts(name: str) -> list[Any]:
    """A name as texts and numbers in turn, which compare with 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def classes_of(model: nn.Module) -> list[str] | int | None:
    """Class names of a model in the order of its logits; if it has none, their number, or None.

    Names are taken from `model.classes` (set by fastnull.models.load_model), the labels of a Hugging Face configuration
    or the label names of a timm model.
    """
    model = unwrap(model)
    network = unwrap(model.network) if isinstance(model, NormalizedModel) else model
    config = getattr(network, "config", None)
    cfg = getattr(network, "pretrained_cfg", None)
    count = _outputs(network) or getattr(network, "num_classes", None) or getattr(config, "num_labels", None)
    count = count if isinstance(count, int) else None
    found = [getattr(model, "classes", None), getattr(network, "classes", None), getattr(config, "id2label", None)]
    if isinstance(cfg, Mapping):
        found.append(cfg.get("label_names"))
    for candidate in found:
        names = _names(candidate)
        # the head may have been replaced since
        if names is not None and count in (None, len(names)):
            return names
    return count


def _outputs(network: nn.Module) -> int | None:
    """Number of outputs of the classifier, which may differ from the configuration if the head was replaced."""
    for name in ("classifier", "head", "fc"):
        layer = getattr(network, name, None)
        if isinstance(layer, nn.Linear):
            return layer.out_features
    return None


def names_of(data: Any) -> list[str] | None:
    """Class names of a data set in the order of its labels; None if it has none.

    They are taken from `classes` and `class_to_idx` (torchvision, this package), those of its `reader` (timm),
    the features of a Hugging Face data set, or from the data set inside a Subset or a transform.
    """
    seen: set[int] = set()
    while data is not None and id(data) not in seen:
        seen.add(id(data))
        for holder in (data, getattr(data, "reader", None)):
            # torchvision's ImageNet has WordNet ids beside lists of synonyms
            for attribute in ("wnids", "class_to_idx", "classes"):
                names = _names(getattr(holder, attribute, None))
                if names is not None:
                    return names
            features = getattr(getattr(holder, "dataset", holder), "features", None)
            if isinstance(features, Mapping):
                label = getattr(holder, "label_key", None) or "label"
                names = _names(getattr(features.get(label), "names", None))
                if names is not None:
                    return names
        data = getattr(data, "base", None) or getattr(data, "dataset", None)
    return None


def check_same_classes(model: nn.Module, other: nn.Module, *, name: str) -> None:
    """Check that two models have the same classes, by name or, without names, by number.

    Raises:
        ValueError: they differ; the message shows both lists.
    """
    one, two = classes_of(model), classes_of(other)
    if one == two or one is None or two is None:
        return
    counts = [known if isinstance(known, int) else len(known) for known in (one, two)]
    if isinstance(one, int) or isinstance(two, int):
        if counts[0] == counts[1]:
            return
        raise ValueError(f"{name} must have the model's {counts[0]} classes; it has {counts[1]}")
    raise ValueError(
        f"{name} must have the model's classes in their order; its {counts[1]} are {shortened(two)}, "
        f"the model's {counts[0]} are {shortened(one)}"
    )


def check_names(classes: Any, count: int | None) -> None:
    """Check a model's `classes`: None, or a list of `count` names (any number if `count` is None).

    Raises:
        TypeError: something else.
        ValueError: another number of names.
    """
    if classes is None:
        return
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes must be a list of names; got {classes!r:.100}")
    if count and len(classes) != count:
        raise ValueError(f"classes must be {count} names, one for each logit; got {len(classes)}: {shortened(classes)}")


@functools.cache
def wordnet_ids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1000 classes in order, from timm."""
    return tuple(import_timm().data.ImageNetInfo("imagenet-1k").label_names())


def shortened(names: Sequence[str], most: int = _SHOWN) -> str:
    """Names for a message: the first ones and the number of the others."""
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown}, ... ({len(names) - most} more)" if len(names) > most else shown


def printable(name: object) -> str:
    """A name as one line of text: line breaks and bytes that are not UTF-8 are escaped."""
    text = str(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _names(found: Any) -> list[str] | None:
    """Names from a list of them, name → index, or index → name; None otherwise."""
    if isinstance(found, Mapping):
        pairs = dict(found.items())
        if pairs and all(isinstance(key, str) and isinstance(value, Integral) for key, value in pairs.items()):
            pairs = {value: key for key, value in pairs.items()}
        if not pairs or sorted(pairs, key=str) != sorted(range(len(pairs)), key=str):
            return None
        found = [pairs[index] for index in range(len(pairs))]
        if all(name == f"LABEL_{index}" for index, name in enumerate(found)):
            return None  # transformers' default names
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(name, str) for name in found):
        return None
    return list(found)


def _plain(name: str) -> str:
    """Unicode normal form C: file systems store accented letters in two forms."""
    return unicodedata.normalize("NFC", name)
