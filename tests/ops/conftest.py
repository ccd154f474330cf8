"""The implementations that CPU tensors can take, one after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastnull import testing


@pytest.fixture(params=testing.cpu_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with testing.use_backend(request.param):
        yield request.param
