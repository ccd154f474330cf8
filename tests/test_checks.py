"""What users hand in wrongly: one error each, with the name, what it was and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fastnull.analysis import AnalysisSettings
from fastnull.bench import BenchSettings
from fastnull.checks import (
    RANGE_TOLERANCE,
    check_choice,
    check_fields,
    check_finite,
    check_images,
    check_labels,
    check_number,
    is_out_of_memory,
    trusted_values,
)
from fastnull.finetune.config import FinetuneConfig
from fastnull.synthesis import SynthesisConfig


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


@pytest.mark.parametrize("value", ["3", b"3", None, True, [1.0], object()])
def test_what_is_no_number_is_said_to_be_none(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^eps must be a number; got .* of type \w+$"):
        check_number("eps", value, 0, 1)


@dataclass(frozen=True)
class Settings:
    count: int = 1
    rate: float = 0.5
    on: bool = False
    name: str = "a"
    limit: float | None = None
    folder: str | None = None
    switch: bool | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    names: tuple[str, ...] | None = None
    table: Mapping[str, Mapping[str, Any]] | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("count", numpy.int64(3), 3),
        ("count", numpy.uint8(3), 3),
        ("count", 10**30, 10**30),
        ("rate", 1, 1),
        ("rate", numpy.float32(0.25), 0.25),
        ("rate", numpy.float64(0.25), 0.25),
        ("rate", numpy.int16(2), 2),
        ("on", numpy.bool_(True), True),
        ("name", numpy.str_("b"), "b"),
        ("name", Path("a") / "b", "a/b"),
        ("limit", None, None),
        ("limit", math.inf, math.inf),
        ("folder", Path("a"), "a"),
        ("switch", False, False),
        ("sizes", [1, numpy.int64(2)], (1, 2)),
        ("sizes", range(2), (0, 1)),
        ("pair", [3, numpy.float32(0.5)], (3, 0.5)),
        ("names", ["a"], ("a",)),
        ("names", None, None),
        ("table", {"a": {"b": [1]}}, {"a": {"b": [1]}}),
        ("dtype", torch.float16, torch.float16),
    ],
)
def test_fields_of_their_type_become_plain(field: str, value: Any, kept: Any) -> None:
    found = getattr(Settings(**{field: value}), field)
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", "3", "^count must be an integer; got '3' of type str$"),
        ("count", 3.0, "^count must be an integer; got 3.0 of type float$"),
        ("count", True, "^count must be an integer; got True of type bool$"),
        ("count", numpy.bool_(True), "^count must be an integer; got True"),
        ("count", None, "^count must be an integer; got None"),
        ("count", torch.tensor(3), r"^count must be an integer; got tensor\(3\) of type Tensor$"),
        ("rate", "0.5", "^rate must be a number; got '0.5'"),
        ("rate", False, "^rate must be a number; got False"),
        ("rate", 1j, "^rate must be a number; got 1j"),
        ("rate", math.nan, "^rate must be a number; got nan$"),
        ("rate", numpy.float32("nan"), "^rate must be a number; got nan$"),
        ("on", "no", "^on must be True or False; got 'no' of type str$"),
        ("on", 1, "^on must be True or False; got 1 of type int$"),
        ("on", None, "^on must be True or False; got None"),
        ("name", 5, "^name must be a string; got 5"),
        ("name", None, "^name must be a string; got None"),
        ("limit", "none", "^limit must be a number or None; got 'none'"),
        ("limit", math.nan, "^limit must be a number or None; got nan"),
        ("switch", "no", "^switch must be True or False or None; got 'no'"),
        ("sizes", 3, "^sizes must be a tuple whose values are each an integer; got 3"),
        ("sizes", "123", "^sizes must be a tuple whose values are each an integer; got '123'"),
        ("sizes", (1, "2"), r"^sizes\[1\] must be an integer; got '2'"),
        ("pair", (1, 2, 3), r"^pair must hold 2 values; got \(1, 2, 3\)$"),
        ("pair", (1.5, 2), r"^pair\[0\] must be an integer; got 1.5"),
        ("table", {"a": 1}, r"^table\['a'\] must be a mapping; got 1"),
        ("table", {1: {}}, "^a key of table must be a string; got 1"),
        ("table", [], "^table must be a mapping or None"),
        ("dtype", "float32", "^dtype must be a dtype; got 'float32'"),
    ],
)
def test_fields_of_another_type_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Settings(**{field: value})


@pytest.mark.parametrize("kind", [FinetuneConfig, SynthesisConfig, AnalysisSettings, BenchSettings])
def test_every_field_of_a_configuration_is_checked(kind: Any) -> None:
    settings = kind()
    for field in fields(settings):
        with pytest.raises(TypeError, match=rf"^{field.name} must be .*; got <object"):
            replace(settings, **{field.name: object()})
    assert replace(settings) == settings


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
