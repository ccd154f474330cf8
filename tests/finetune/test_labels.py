"""Labels in every form: classes, one-hot and soft labels, smoothed and mixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch

from fastnull.compat import import_timm
from fastnull.distributed import Processes
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.config import AUGMENTS
from fastnull.finetune.plan import make_plan
from fastnull.finetune.training import Training
from tests.finetune.runs import (
    MIXED,
    SGD,
    SMALL,
    TEN,
    weights_of,
)

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
    result = finetune(replace(SMALL, num_classes=10, epochs=1, augment=augment, **changes), None, (images, soft))
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
