"""Data and model of a run: classes matched by name, labels in every form, bad data refused before the first step."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastnull.compat import import_timm
from fastnull.data import evaluation_data
from fastnull.data.classes import _warn_of_order
from fastnull.distributed import Processes
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.config import AUGMENTS
from fastnull.finetune.plan import make_plan
from fastnull.finetune.prepare import prepare
from fastnull.finetune.training import Training
from fastnull.models import create_model, load_model, save_checkpoint
from tests.finetune.runs import (
    BLUE,
    GREEN,
    MIXED,
    RED,
    SGD,
    SMALL,
    TEN,
    Broken,
    coloured,
    small,
    weights_of,
)


def test_labels_mean_the_models_classes_all_the_way(tmp_path):
    """A model of three classes, its file, folders that have two of them or name them in another order."""
    three = coloured(tmp_path / "three", {"cat": RED, "dog": GREEN, "frog": BLUE})
    config = replace(SMALL, data=str(three), epochs=20, batch_size=12, lr=5e-3, img_size=16, val_fraction=0.0,
                     color_jitter=0.0, out=str(tmp_path / "run"))  # fmt: skip
    result = finetune(config)
    assert result.model.classes == ["cat", "dog", "frog"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["classes"] == ["cat", "dog", "frog"]
    model = load_model(tmp_path / "run" / "last.safetensors").eval()
    assert model.classes == ["cat", "dog", "frog"]

    def accuracy(data: Path, model: nn.Module = model) -> float:
        images, labels = zip(*evaluation_data(str(data), model), strict=True)
        return (model(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean().item()

    assert accuracy(three) == 1
    two = coloured(tmp_path / "two", {"dog": GREEN, "frog": BLUE})
    assert accuracy(two) == 1
    with pytest.raises(ValueError, match="does not know: bird"):
        accuracy(coloured(tmp_path / "bird", {"bird": RED, "dog": GREEN}))

    # going on from the file with a folder of the same classes keeps its head, whatever the order of the names
    turned = copy.deepcopy(model)
    turned.classes = ["frog", "cat", "dog"]
    for parameter in turned.network.head.parameters():
        parameter.data = parameter.data[[2, 0, 1]]
    save_checkpoint(turned, tmp_path / "turned.safetensors")
    again = finetune(replace(config, checkpoint=str(tmp_path / "turned.safetensors"), epochs=1, lr=1e-9, out=None))
    assert again.model.classes == ["frog", "cat", "dog"]
    assert again.history[0]["loss"] < 2 * result.history[-1]["loss"] + 0.01  # 2.5 and more with labels in other places
    assert accuracy(three, again.model.eval()) == 1


def test_a_head_for_other_classes_starts_fresh(tmp_path):
    model = create_model("vit_digits", num_classes=2)
    model.classes = ["cat", "dog"]
    path = tmp_path / "pets.safetensors"
    save_checkpoint(model, path)
    data = coloured(tmp_path / "data", {"bird": RED, "frog": GREEN})
    config = replace(SMALL, data=str(data), checkpoint=str(path), img_size=16, batch_size=8, epochs=1, lr=1e-9)
    with pytest.warns(UserWarning, match=r"for other classes \(cat, dog\); .*for bird, frog is initialised randomly"):
        found = finetune(config).model
    assert found.classes == ["bird", "frog"]
    assert not torch.allclose(found.network.head.weight, model.network.head.weight, atol=1e-3)
    torch.testing.assert_close(found.network.blocks[0].attn.qkv.weight, model.network.blocks[0].attn.qkv.weight)


def test_a_kept_head_without_names_warns_of_the_assumed_order(tmp_path):
    """A new head learns any order; one that was trained elsewhere may have torchvision's."""
    data = coloured(tmp_path / "data", {"apple": RED, "Bird": GREEN})
    config = replace(SMALL, data=str(data), img_size=16)
    _warn_of_order.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(config, torch.device("cpu")).model.classes == ["apple", "Bird"]
    with pytest.warns(UserWarning, match="assumed in timm's order of the folders, apple, Bird"):
        prepare(config, torch.device("cpu"), create_model("vit_digits", num_classes=2))


def test_a_given_model_must_have_the_datas_classes(tmp_path):
    data = str(coloured(tmp_path / "data", {"bird": RED, "frog": GREEN}))
    config = replace(SMALL, data=data, img_size=16, batch_size=8, epochs=1)
    with pytest.raises(ValueError, match=r"the training data has 2 classes .bird, frog., the model 10 without names"):
        finetune(config, model=create_model("vit_digits"))
    named = create_model("vit_digits", num_classes=2)
    named.classes = ["bird", "dog"]
    with pytest.raises(ValueError, match="the training data has classes that the model does not know: frog"):
        finetune(config, model=named)


class _Named(TensorDataset):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> None:
        super().__init__(images, labels)
        self.classes = classes


def test_held_out_images_are_matched_by_name(few):
    images, labels = few
    names = [str(digit) for digit in range(10)]
    plain = finetune(replace(SMALL, num_classes=10), train_data=few, val_data=few)
    turned = _Named(images, 9 - labels, names[::-1])
    train = _Named(images, labels, names)
    assert finetune(SMALL, train_data=train, val_data=turned).history[-1]["val_accuracy"] == pytest.approx(
        plain.history[-1]["val_accuracy"]
    )
    with pytest.raises(ValueError, match="val_data has classes that the model does not know: ten"):
        finetune(SMALL, train_data=train, val_data=_Named(images, labels, ["ten"]))


@pytest.mark.parametrize("how", ["folder", "data", "model"])
def test_one_class_teaches_nothing(tmp_path, few, how):
    config, arguments = SMALL, {}
    if how == "folder":
        config = replace(SMALL, data=str(coloured(tmp_path, {"cat": RED})), img_size=16)
    elif how == "data":
        arguments = {"train_data": _Named(few[0], torch.zeros(48, dtype=torch.long), ["0"])}
    else:
        config, arguments = replace(SMALL, num_classes=1), {"train_data": (few[0], torch.zeros(48, dtype=torch.long))}
    with pytest.raises(ValueError, match="at least two classes"):
        finetune(config, **arguments)


def test_grey_models_learn_from_augmented_files(tmp_path):
    data = coloured(tmp_path / "data", {"cat": RED, "dog": GREEN})
    config = replace(SMALL, data=str(data), batch_size=8, epochs=1, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
    model = create_model("vit_digits", num_classes=2, channels=1)
    assert math.isfinite(finetune(config, model=model).history[-1]["loss"])
    with pytest.raises(ValueError, match="takes images of 4 channels; image files give 1"):
        finetune(config, model=create_model("vit_digits", num_classes=2, channels=4))


BAD_DATA = {
    "labels out of range": (lambda x, y: (x, y + 5), ValueError, r"labels must lie in 0\.\.9"),
    "normalised images": (lambda x, y: (2 * x - 1, y), ValueError, r"images must be pixels in \[0, 1\]"),
    "NaN": (lambda x, y: (torch.where(x > 0.9, torch.nan, x), y), ValueError, "must be finite"),
    "integers": (lambda x, y: (x.long(), y), TypeError, "floating dtype"),
    "wrong size": (lambda x, y: (x[..., :12], y), ValueError, r"does not take the training images \[3, 16, 12\]"),
    "wrong channels": (lambda x, y: (x[:, :1], y), ValueError, "does not take the training images|channels"),
    "empty": (lambda x, y: (x[:0], y[:0]), ValueError, "at least one image"),
    "unequal": (lambda x, y: (x, y[:-1]), ValueError, "a label for each image"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("augment", ["none", "boundary"])
def test_bad_data(few, case, augment):
    spoil, error, message = BAD_DATA[case]
    with pytest.raises(error, match=message):
        finetune(small(augment, num_classes=10), train_data=spoil(*few))


BAD_LABELS = {
    "logits": (lambda x, y: (x, 9 * TEN[y] - 1), r"labels must be probabilities, .* a value of -1 and a sum of"),
    "several classes": (lambda x, y: (x, TEN[y] + TEN[y - 1]), "a value of 0 and a sum of 2"),
    "other classes": (lambda x, y: (x, TEN[y][:, :9]), "must have 10 classes; got 9"),
    "fractions": (lambda x, y: (x, y + 0.5), r"must be integers \[B\] or soft labels"),
    "complex": (lambda x, y: (x, TEN[y].to(torch.complex64)), "must be integers"),
    "three tensors": (lambda x, y: (x, y, y), "a pair of tensors, images and labels; got 3"),
    "words": (lambda x, y: (x, ["three"] * len(y)), "a pair of tensors, images and labels"),
    "a number": (lambda x, y: (x, torch.tensor(3)), "a label for each image"),
    "samples of three": (lambda x, y: [(x[0], 1, 2)] * 10, r"pairs \(image, label\)"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused_before_the_first_step(few, monkeypatch, case):
    spoil, message = BAD_LABELS[case]
    monkeypatch.setattr(Training, "train_step", None)
    config = replace(SMALL, num_classes=10)
    with pytest.raises((TypeError, ValueError), match=message):
        finetune(config, train_data=spoil(*few))
    with pytest.raises((TypeError, ValueError), match=message):
        finetune(config, train_data=few, val_data=spoil(*few))


def test_a_list_of_samples_is_a_dataset(few):
    images, labels = few
    samples = list(zip(images, labels.tolist(), strict=True))
    config = replace(SMALL, num_classes=10, epochs=1)
    assert torch.equal(weights_of(finetune(config, None, samples)), weights_of(finetune(config, None, list(few))))


def test_data_without_an_index_is_refused(few):
    with pytest.raises(TypeError, match="a length and an index"):
        finetune(replace(SMALL, num_classes=10), train_data=torch.utils.data.DataLoader([1]))
    with pytest.raises(TypeError, match="a length and an index"):
        finetune(replace(SMALL, num_classes=10), train_data=iter([1]))
    with pytest.raises(ValueError, match="num_classes is needed"):
        finetune(SMALL, train_data=few)


def test_settings_that_need_the_model(few):
    with pytest.raises(ValueError, match="auto_augment and reprob are for image files"):
        finetune(replace(SMALL, reprob=0.5))
    with pytest.raises(ValueError, match=r"opt must be one of .* Did you mean 'adamw'"):
        finetune(replace(SMALL, num_classes=10, opt="adamww"), train_data=few)
    with pytest.raises(ValueError, match="layer_decay needs a list of blocks, and Broken has no list"):
        finetune(replace(SMALL, num_classes=10, layer_decay=0.5), Broken(), few)
    with pytest.raises(ValueError, match="no adapter splits Broken"):
        finetune(replace(SMALL, num_classes=10, augment="boundary"), Broken(), few)


LABELS: dict[str, Callable[[torch.Tensor], Any]] = {
    **{str(dtype)[6:]: (lambda y, dtype=dtype: y.to(dtype)) for dtype in (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32,
    )},
    "numpy": lambda y: y.to(torch.int32).numpy(),
    "list": lambda y: y.tolist(),
    **{f"one-hot {str(dtype)[6:]}": (lambda y, dtype=dtype: TEN[y].to(dtype)) for dtype in (
        torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64,
    )},
}  # fmt: skip
"""The same labels in other forms."""


@pytest.fixture(scope="module")
def by_index(few):
    """A run on class indices in int64, without and with mixing."""
    config = replace(SGD, num_classes=10, epochs=1)
    return {mixed: finetune(replace(config, **(MIXED if mixed else {})), None, few, few) for mixed in (False, True)}


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("form", LABELS)
def test_labels_of_every_form_train_the_same_model(few, by_index, form, mixed):
    images, labels = few
    data = (images, LABELS[form](labels))
    config = replace(SGD, num_classes=10, epochs=1, **(MIXED if mixed else {}))
    result = finetune(config, None, data, list(data))
    right = by_index[mixed]
    assert result.history[-1]["val_accuracy"] == right.history[-1]["val_accuracy"]
    assert result.history[-1]["loss"] == pytest.approx(right.history[-1]["loss"], rel=1e-6)
    torch.testing.assert_close(weights_of(result), weights_of(right), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 10])
def test_bool_labels_are_the_classes_0_and_1(few, classes):
    images, labels = few
    config = replace(SMALL, num_classes=classes, epochs=1)
    right = finetune(config, None, (images, labels % 2), few[:1] + (labels % 2,))
    result = finetune(config, None, (images, labels % 2 == 1), few[:1] + (labels % 2 == 1,))
    assert torch.equal(weights_of(result), weights_of(right))
    assert result.best_accuracy == right.best_accuracy


@pytest.mark.parametrize("held_out", [3, 8, 10, 17])
def test_accuracy_of_soft_labels_is_that_of_the_likeliest_class(held_out):
    """One-hot labels once gave 900 %, and with any other number of held-out images than classes an error."""
    images = torch.rand(100, 3, 16, 16)
    soft = TEN[torch.zeros(100, dtype=torch.long)] * 0.6 + 0.04
    config = FinetuneConfig(num_classes=10, epochs=3, batch_size=10, augment="none", lr=5e-3, progress=False)
    result = finetune(config, None, (images, soft), (images[:held_out], soft[:held_out]))
    assert result.best_accuracy == 100.0


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("changes", [{}, {**MIXED, "accumulate": 2}], ids=["plain", "mixed in parts"])
@pytest.mark.filterwarnings("ignore:the universal noise")
def test_soft_labels_train_with_every_augmentation(few, augment, changes):
    images, labels = few
    soft = TEN[labels] * 0.8 + 0.02
    config = small(augment, num_classes=10, epochs=1, **changes)
    result = finetune(config, None, (images, soft))
    assert math.isfinite(result.history[-1]["loss"])
    assert 0 <= result.best_accuracy <= 100


def test_smoothing_is_that_of_soft_labels(few):
    """Smoothed in the loss, in mixing, or by hand: one target."""
    images, labels = few
    config = replace(SGD, num_classes=10, epochs=1)
    by_hand = finetune(config, None, (images, 0.8 * TEN[labels] + 0.02))
    smoothed = finetune(replace(config, smoothing=0.2), None, few)
    torch.testing.assert_close(weights_of(smoothed), weights_of(by_hand), rtol=1e-5, atol=1e-6)
    by_hand = finetune(replace(config, mixup=0.4), None, (images, 0.8 * TEN[labels] + 0.02))
    smoothed = finetune(replace(config, mixup=0.4, smoothing=0.2), None, few)
    torch.testing.assert_close(weights_of(smoothed), weights_of(by_hand), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 0.5}, {"mixup": 0.4, "cutmix": 0.5}], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_mixed_labels_are_those_of_timm(vit, images, settings, soft):
    config = FinetuneConfig(augment="none", num_classes=10, batch_size=8, smoothing=0.1, progress=False, **settings)
    training = Training(config, vit, make_plan(config, 8), 10, torch.device("cpu"), Processes())
    labels = torch.arange(8)
    for seed in range(5):
        numpy.random.seed(seed)
        right = import_timm().data.Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=10)(
            images.clone(), labels
        )
        numpy.random.seed(seed)
        found = training._mixed(images.clone(), TEN[labels] if soft else labels)
        assert torch.equal(found[0], right[0])
        torch.testing.assert_close(found[1], right[1])
