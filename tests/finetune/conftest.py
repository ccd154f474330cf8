"""Data for the tests of finetuning."""

from __future__ import annotations

import pytest

from fastnull.data import digits


@pytest.fixture(scope="module")
def few():
    images, labels = digits()[0].tensors
    return images[:48], labels[:48]
