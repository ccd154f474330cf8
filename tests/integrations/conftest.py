"""Lightning's two packages, and a check of the weights that noise is computed with."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integrations.models import LIGHTNING, lightning_of


@pytest.fixture(params=LIGHTNING)
def lightning(request: pytest.FixtureRequest) -> Any:
    """(the library, our callback for it)."""
    return lightning_of(request.param)
