"""Counters and summaries, by hand."""

from __future__ import annotations

import pytest
import torch

from fastnull.robustness import Accuracy, mean_corruption_accuracy, mean_corruption_error
from fastnull.robustness.metrics import ALEXNET_ERRORS


def test_accuracy_counts_images_not_batches() -> None:
    accuracy = Accuracy()
    logits = torch.eye(7)
    accuracy.update(logits, torch.arange(7))  # all right
    accuracy.update(logits[:1], torch.tensor([6]))  # wrong; a tie of six for the second place
    assert accuracy.images == 8
    assert accuracy.top1 == pytest.approx(100 * 7 / 8)


def test_top5_by_hand() -> None:
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]] * 7)
    accuracy = Accuracy()
    accuracy.update(logits, torch.arange(7))
    assert accuracy.top1 == pytest.approx(100 / 7)
    assert accuracy.top5 == pytest.approx(500 / 7)


def test_fewer_than_five_classes() -> None:
    accuracy = Accuracy()
    accuracy.update(torch.tensor([[1.0, 2, 3]]), torch.tensor([0]))
    assert (accuracy.top1, accuracy.top5) == (0, 100)


def test_accuracy_refuses_what_it_cannot_count() -> None:
    accuracy = Accuracy()
    with pytest.raises(ValueError, match="no images"):
        _ = accuracy.top1
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.6; got values from 0 to 7"):
        accuracy.update(torch.eye(7)[:2], torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"labels must be classes \[B\]"):
        accuracy.update(torch.eye(7), torch.eye(7))
    accuracy.update(torch.empty(0, 7), torch.empty(0, dtype=torch.long))
    assert accuracy.images == 0


def alexnet(scale: float = 1.0) -> dict[str, dict[str, float]]:
    return {
        name: {str(s): 100 * (1 - scale * error) for s, error in enumerate(errors, 1)}
        for name, errors in ALEXNET_ERRORS.items()
    }


def test_alexnet_itself_has_an_mce_of_100() -> None:
    assert mean_corruption_error(alexnet()) == pytest.approx(100)
    assert mean_corruption_error(alexnet(0.5)) == pytest.approx(50)


def test_the_table_has_the_published_means() -> None:
    published = {
        "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
        "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
        "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
        "pixelate": 0.717840, "jpeg_compression": 0.606500,
    }  # fmt: skip
    assert {name: sum(errors) / 5 for name, errors in ALEXNET_ERRORS.items()} == pytest.approx(published, abs=1e-9)


def test_mce_sums_over_severities_before_it_divides() -> None:
    accuracies = alexnet()
    accuracies["fog"] = {str(s): 0.0 for s in range(1, 6)}  # error 1 everywhere
    expected = 100 * (14 + 5 / sum(ALEXNET_ERRORS["fog"])) / 15
    assert mean_corruption_error(accuracies) == pytest.approx(expected)


def test_mce_names_what_is_missing() -> None:
    accuracies = alexnet()
    del accuracies["frost"]
    del accuracies["fog"]["3"]
    with pytest.raises(ValueError, match=r"missing: frost/1, .*frost/5, fog/3$"):
        mean_corruption_error(accuracies)


def test_mean_corruption_accuracy_weighs_corruptions_equally() -> None:
    assert mean_corruption_accuracy({"a": {1: 10.0, 2: 20.0}, "b": {1: 45.0}}) == pytest.approx(30)
    with pytest.raises(ValueError, match="nothing"):
        mean_corruption_accuracy({})
