"""What users hand in wrongly: one error each, with the name, what it was and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastnull.checks import (
    RANGE_TOLERANCE,
    check_choice,
    check_finite,
    check_images,
    check_labels,
    check_number,
    is_out_of_memory,
    trusted_values,
)


def test_choice() -> None:
    assert check_choice("mode", "fast", ("fast", "slow")) == "fast"
    with pytest.raises(ValueError, match=r"^mode must be one of 'fast', 'slow'; got 'fats'\. Did you mean 'fast'\?$"):
        check_choice("mode", "fats", ("fast", "slow"))
    with pytest.raises(ValueError, match=r"got None\.$"):
        check_choice("mode", None, iter(["fast", "slow"]))
    with pytest.raises(ValueError, match=r"got \['fast'\]"):  # unhashable
        check_choice("mode", ["fast"], {"fast": 1})


@pytest.mark.parametrize(
    ("value", "limits"),
    [(0.0, (0, 1)), (1.0, (0, 1)), (-1e9, (None, 0)), (1e9, (0, None)), (3, (None, None))],
)
def test_numbers_that_pass(value: float, limits: tuple[float | None, float | None]) -> None:
    check_number("eps", value, *limits)


@pytest.mark.parametrize(
    ("value", "limits", "exclusive", "message"),
    [
        (-0.1, (0, 1), False, r"^eps must be >= 0 and <= 1; got -0\.1$"),
        (1.1, (0, 1), False, r"<= 1; got 1\.1"),
        (0, (0, None), True, r"^eps must be > 0; got 0$"),
        (2, (None, 1), False, r"^eps must be <= 1; got 2$"),
        (math.nan, (0, 1), False, "got nan"),
        (math.nan, (None, None), False, "must be a finite number; got nan"),
        (math.inf, (0, None), False, "must be >= 0; got inf"),
    ],
)
def test_numbers_that_do_not(value: float, limits: tuple, exclusive: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_number("eps", value, *limits, exclusive=exclusive)


def test_finite() -> None:
    check_finite("noise", torch.zeros(0))
    check_finite("noise", torch.tensor([1, 2]))
    check_finite("noise", torch.tensor([3e38, -3e38]))  # their sum overflows, they do not
    with pytest.raises(ValueError, match=r"^noise must be finite; it holds 1 NaN and 2 Inf among 4 values$"):
        check_finite("noise", torch.tensor([math.nan, math.inf, -math.inf, 0.0]))


def test_images_that_pass() -> None:
    check_images(torch.rand(2, 3, 4, 5))
    check_images(torch.rand(2, 3, 4, 5).half(), channels=3, size=(4, 5))
    check_images(torch.empty(0, 3, 4, 5))
    outside = RANGE_TOLERANCE / 2  # resampling's rounding
    check_images(torch.tensor([-outside, 1 + outside]).view(1, 1, 1, 2))
    check_images(torch.randn(1, 3, 4, 4) * 9, unit_range=False)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([[0.5]], {}, TypeError, r"^images must be a tensor \[B, C, H, W\]; got list$"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {}, TypeError, "floating dtype.*torch.uint8"),
        (torch.zeros(3, 4, 4), {}, ValueError, r"got \[3, 4, 4\]"),
        (torch.zeros(1, 1, 4, 4), {"channels": 3}, ValueError, "must have 3 channels; got 1"),
        (torch.zeros(1, 3, 4, 6), {"size": (4, 4)}, ValueError, "must be 4x4 pixels; got 4x6"),
        (torch.full((1, 3, 4, 4), math.nan), {}, ValueError, "48 NaN"),
        (torch.full((1, 3, 4, 4), math.inf), {"unit_range": False}, ValueError, "48 Inf"),
        (torch.full((1, 3, 4, 4), 255.0), {}, ValueError, r"range \[255, 255\].*NormalizedModel"),
        (torch.full((1, 3, 4, 4), -1e-5), {}, ValueError, r"pixels in \[0, 1\]"),
        (torch.zeros(3, 4, 4), {"name": "views"}, ValueError, "^views must have shape"),
    ],
)
def test_bad_images(images: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_images(images, **options)


def test_labels_that_pass() -> None:
    check_labels(torch.tensor([0, 9, 3]), 10, 3)
    check_labels(torch.tensor([0, 1], dtype=torch.int32), 2, 2)
    check_labels(torch.rand(3, 10), 10, 3)
    check_labels(torch.zeros(0, dtype=torch.int64), 10, 0)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1, 2], TypeError, "labels must be a tensor; got list"),
        (torch.tensor(1), ValueError, r"one entry per image \(3\); got shape \[\]"),
        (torch.tensor([0, 1]), ValueError, r"one entry per image \(3\); got shape \[2\]"),
        (torch.tensor([0, 1, 10]), ValueError, r"must lie in 0\.\.9; got values from 0 to 10"),
        (torch.tensor([0, 1, -1]), ValueError, r"must lie in 0\.\.9; got values from -1 to 1"),
        (torch.tensor([0.0, 1.0, 2.0]), ValueError, r"must be integers \[B\] or soft labels"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), ValueError, "must be integers"),
        (torch.zeros(3, 9), ValueError, "soft labels must have 10 classes; got 9"),
        (torch.full((3, 10), math.nan), ValueError, "30 NaN"),
    ],
)
def test_bad_labels(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_labels(labels, 10, 3)


def test_trusted_values_are_not_looked_at_and_shapes_are() -> None:
    bad = torch.full((2, 3, 4, 4), torch.nan)
    with trusted_values():
        with trusted_values(False):
            check_images(bad)
        check_labels(torch.tensor([3, 99]), 10, 2)
        with pytest.raises(ValueError, match="3 channels"):
            check_images(bad[:, :1], channels=3)
    with pytest.raises(ValueError, match="must be finite"), trusted_values(False):
        check_images(bad)


def test_out_of_memory_on_a_cpu_is_known_by_its_text() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50)
    assert type(refused.value) is RuntimeError
    assert is_out_of_memory(refused.value)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("std::bad_alloc")):
        assert is_out_of_memory(error)
    windows = RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you ...")
    assert is_out_of_memory(windows)


def test_other_errors_are_not_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2) + torch.empty(3)
    others = (refused.value, RuntimeError("out of luck"), ValueError("std::bad_alloc"), KeyboardInterrupt())
    assert not any(is_out_of_memory(error) for error in others)
