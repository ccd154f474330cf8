"""pytest-benchmark over the same cases as `fastnull bench`: a test a variant, judged before it is timed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.common import Variant, judged, name_of
from fastnull.bench import BenchSettings


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--full", action="store_true", help="the sizes of `fastnull bench`; else those of --quick")


def pytest_generate_tests(metafunc: Any) -> None:
    """Every variant of every case of the module."""
    if "variant" not in metafunc.fixturenames:
        return
    settings = BenchSettings() if metafunc.config.getoption("--full") else BenchSettings.quickly()
    found = []
    for case in metafunc.module.cases(settings):
        verdicts = judged(case)
        for variant in case.variants:
            label = f"{case.op} {case.mode}-{variant.backend}-{name_of(variant.dtype)}"
            found.append(pytest.param((variant, verdicts[variant.backend, variant.dtype][1]), id=label))
    metafunc.parametrize("variant", found, indirect=True)


@pytest.fixture
def variant(request: Any) -> Variant:
    """A variant whose result is right; fails on a wrong one."""
    chosen, wrong = request.param
    if chosen.skip:
        pytest.skip(chosen.skip)
    if wrong:
        pytest.fail(wrong)
    return chosen
