"""Accuracy per image, and the usual summaries of corruption results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastnull.checks import check_labels

ALEXNET_ERRORS: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
"""Error of AlexNet on ImageNet-C, severities 1 to 5: what mCE divides by."""


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] bool: whether the largest of the logits [B, K] is that of the class [B].

    Raises:
        ValueError: labels that are no classes 0 .. K - 1.
    """
    check_labels(labels, logits.shape[1], len(logits))
    if labels.ndim != 1:
        raise ValueError(f"labels must be classes [B]; got shape {list(labels.shape)}")
    return logits.argmax(1) == labels.to(logits.device)


class Accuracy:
    """Counts of correct predictions. The counters stay on the device, so `update` does not synchronise."""

    def __init__(self) -> None:
        self.images = 0
        self._top1: Tensor | int = 0
        self._top5: Tensor | int = 0

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, K], classes [B]. With fewer than five classes, top-5 is always correct.

        Raises:
            ValueError: labels that are no classes 0 .. K - 1.
        """
        right = correct(logits, labels)
        if len(logits) == 0:
            return
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5], largest first
        hits = best == labels.to(logits.device)[:, None]
        # argmax and topk may break a tie differently: top-1 is argmax everywhere in this package
        self._top1 = self._top1 + right.sum()
        self._top5 = self._top5 + hits.any(1).sum()
        self.images += len(logits)

    def counts(self) -> dict[str, int]:
        """Images and hits so far; waits for the device."""
        return {"images": self.images, "top1": int(self._top1), "top5": int(self._top5)}

    def add(self, counts: Mapping[str, int]) -> None:
        """Add the `counts` of another process or an earlier run."""
        self.images += counts["images"]
        self._top1 = self._top1 + counts["top1"]
        self._top5 = self._top5 + counts["top5"]

    @property
    def top1(self) -> float:
        """Percent of images whose largest logit is the label's. Raises ValueError before the first image."""
        return self._percent(self._top1)

    @property
    def top5(self) -> float:
        """Percent of images whose label is among the five largest logits."""
        return self._percent(self._top5)

    def _percent(self, hits: Tensor | int) -> float:
        if self.images == 0:
            raise ValueError("no images were counted")
        return 100.0 * int(hits) / self.images


def mean(values: Mapping[Any, float]) -> float:
    """Plain mean of a table's values. Raises ValueError for an empty one."""
    if not values:
        raise ValueError("there is nothing to average")
    return sum(values.values()) / len(values)


def mean_corruption_accuracy(accuracies: Mapping[str, Mapping[Any, float]]) -> float:
    """Mean over corruptions of the mean over severities; {name: {severity: accuracy in %}} → %."""
    return mean({name: mean(table) for name, table in accuracies.items()})


def mean_corruption_error(accuracies: Mapping[str, Mapping[Any, float]]) -> float:
    """mCE: 100 × mean over the 15 corruptions of Σ_s error(s) / Σ_s error of AlexNet(s).

    Args:
        accuracies: {name: {severity: accuracy in %}}, severities 1 .. 5 as integers or strings; further names are
            ignored. mCE is defined for ImageNet-C's own files; of in-memory corruptions it is an estimate at best.

    Raises:
        ValueError: a corruption or severity is missing (all missing ones are named).
    """
    tables = {name: {int(severity): value for severity, value in table.items()} for name, table in accuracies.items()}
    missing = [
        f"{name}/{severity}"
        for name in ALEXNET_ERRORS
        for severity in range(1, 6)
        if severity not in tables.get(name, {})
    ]
    if missing:
        raise ValueError(f"mCE needs 15 corruptions at 5 severities; missing: {', '.join(missing)}")
    ratios = {
        name: sum(1 - tables[name][severity] / 100 for severity in range(1, 6)) / sum(errors)
        for name, errors in ALEXNET_ERRORS.items()
    }
    return 100 * mean(ratios)
