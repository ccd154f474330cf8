"""Names of classes: which class of a model a class of some data is.

A label is a number, and means nothing without the list that it counts in. Where model and data both have names, these
decide. Without them the order has to, and that is believed only where the numbers of classes agree.
"""

from __future__ import annotations

import functools
import unicodedata
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
    """The number that each class of some data has in the model.

    Args:
        model_classes: what `classes_of(model)` returns: the names in the order of the logits, or only how many there
            are, or None where not even that is known.
        folder_classes: names of the data's classes, such as its folders. A subset of the model's is fine.
        name: of the data in messages.

    Returns:
        For each of `folder_classes` the index of the model's class. Without names of the model that is the folder's own
        order, where the numbers of classes agree, or ImageNet's where 1000 classes meet folders with WordNet ids.

    Raises:
        ValueError: a class that the model does not know or knows twice, or, without names, another number of classes.
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
            else f"classes of whose name the model has several: {shortened(twice)}"
        )
        raise ValueError(
            f"{name} has {fault}. Its {len(folder_classes)} classes are {shortened(folder_classes)}; "
            f"the model's {len(known)} are {shortened(known)}"
        )
    return [places[_plain(folder)][0] for folder in folder_classes]


def model_names(
    model_classes: Sequence[str] | int | None, folder_classes: Sequence[str], *, name: str = "data"
) -> list[str]:
    """Names of a model's classes; where it has none, those that it gets from data whose labels it is to tell.

    These are the data's own, where the numbers of classes agree, or ImageNet's WordNet ids where a model of 1000
    classes meets some of them. Arguments and errors are those of `match_classes`.
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
        "without names, so its labels cannot be told. A model that fastnull finetuned on the data knows the names; "
        "else set them: model.classes = [...]"
    )


def classes_of(model: nn.Module) -> list[str] | int | None:
    """Names of a model's classes in the order of its logits; where it has none, their number, or None.

    Names are looked for in `model.classes` (of fastnull.models.load_model), the labels of a Hugging Face configuration
    and those that come with a timm model.
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
        # those of a head that was replaced since would be lies
        if names is not None and count in (None, len(names)):
            return names
    return count


def _outputs(network: nn.Module) -> int | None:
    """Outputs of a model's classifier, which may have been replaced without a word to the configuration."""
    for name in ("classifier", "head", "fc"):
        layer = getattr(network, name, None)
        if isinstance(layer, nn.Linear):
            return layer.out_features
    return None


def names_of(data: Any) -> list[str] | None:
    """Names of a data set's classes in the order of its labels, where it has them.

    They are looked for in `classes` and `class_to_idx` (torchvision's, ours), in the same of its `reader` (timm's), in
    the features of a Hugging Face data set, and in the data set that a Subset or a transform wraps.
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
    """Check that two models mean the same by a label, as far as they have names, or numbers of classes.

    Raises:
        ValueError: they do not; the message shows both lists.
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
    """Check a model's `classes`: None, or a list of `count` names (of any number where that is None).

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
    """The WordNet ids of ImageNet's 1000 classes in order (timm brings the list)."""
    return tuple(import_timm().data.ImageNetInfo("imagenet-1k").label_names())


def shortened(names: Sequence[str], most: int = _SHOWN) -> str:
    """Names for a message: the first of them, and how many follow."""
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown}, ... ({len(names) - most} more)" if len(names) > most else shown


def printable(name: object) -> str:
    """A name as one line of text: line breaks and bytes that are no UTF-8 escaped."""
    text = str(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _names(found: Any) -> list[str] | None:
    """Names from a list of them, name → index, or index → name; None where it is none of these."""
    if isinstance(found, Mapping):
        pairs = dict(found.items())
        if pairs and all(isinstance(key, str) and isinstance(value, Integral) for key, value in pairs.items()):
            pairs = {value: key for key, value in pairs.items()}
        if not pairs or sorted(pairs, key=str) != sorted(range(len(pairs)), key=str):
            return None
        found = [pairs[index] for index in range(len(pairs))]
        if all(name == f"LABEL_{index}" for index, name in enumerate(found)):
            return None  # what transformers writes where nobody gave names
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(name, str) for name in found):
        return None
    return list(found)


def _plain(name: str) -> str:
    """One form of accented letters: file systems write them in two."""
    return unicodedata.normalize("NFC", name)
