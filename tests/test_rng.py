"""Keyed generators and the global ones left alone."""

from __future__ import annotations

import random

import numpy
import torch

from fastnull.rng import generator, preserved, uniform


def test_same_key_same_numbers_and_other_keys_others() -> None:
    drawn = {
        key: torch.rand(4, generator=generator(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0,), (2**70, 3))
    }
    torch.testing.assert_close(drawn[0, 1], torch.rand(4, generator=generator(0, 1)), rtol=0, atol=0)
    values = list(drawn.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_uniform_fills_its_range() -> None:
    drawn = uniform((1000,), 3.0, generator(0), torch.zeros(1))
    assert -3 <= drawn.min() < -2.9
    assert 2.9 < drawn.max() <= 3
    assert uniform((2,), 1.0, generator(0), torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert uniform((2,), 1.0, generator(0), torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_global_generators_are_preserved() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), numpy.random.rand()

    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    expected = draw()
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    with preserved():
        draw()
    assert draw() == expected
