"""Keyed numbers against splitmix64 in Python integers, and their distribution; global generators left alone."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy
import pytest
import torch

from fastnull.rng import KeyedRandom, generator, preserved


def test_same_key_same_numbers_and_other_keys_others() -> None:
    drawn = {
        key: torch.rand(4, generator=generator(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0,), (2**70, 3))
    }
    torch.testing.assert_close(drawn[0, 1], torch.rand(4, generator=generator(0, 1)), rtol=0, atol=0)
    values = list(drawn.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_global_generators_are_preserved() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), numpy.random.rand()

    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    expected = draw()
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    with preserved():
        draw()
    assert draw() == expected


MASK = (1 << 64) - 1


def mix(value: int) -> int:
    value &= MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def reference(seed: int, purpose: str, index: int, draw: int, position: int) -> int:
    golden = 0x9E3779B97F4A7C15
    base = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
    key = mix(mix((index + 1) * golden) ^ base)
    return mix(mix(key + (draw + 1) * golden) + (position + 1) * golden)


def reference_uniform(*address: Any) -> float:
    return ((reference(*address) >> 41) + 0.5) * 2.0**-23


def reference_symmetric(seed: int, purpose: str, index: int, draw: int, position: int) -> float:
    half = reference(seed, purpose, index, draw, position // 2) >> 32 * (position % 2) & 0xFFFFFFFF
    return (half - (1 << 32) * (half >> 31)) * 2.0**-31


def test_matches_splitmix_in_python_integers() -> None:
    # a negative and a large index: the products wrap
    indices = torch.tensor([0, 5, -3, 2**40])
    random = KeyedRandom(11, "test", indices)
    first, second, third, fourth = random.uniform(2, 3), random.uniform(4), random.symmetric(5), random.integers(7)
    for row, index in enumerate(indices.tolist()):
        assert first[row].flatten().tolist() == [reference_uniform(11, "test", index, 0, k) for k in range(6)]
        assert second[row].tolist() == [reference_uniform(11, "test", index, 1, k) for k in range(4)]
        rounded = torch.tensor([reference_symmetric(11, "test", index, 2, k) for k in range(5)])
        assert torch.equal(third[row], rounded)
        assert int(fourth[row]) == (reference(11, "test", index, 3, 0) >> 32) * 7 >> 32


def test_splitmix_itself() -> None:
    # the published test vector: first outputs of splitmix64 seeded with 1234567
    golden = 0x9E3779B97F4A7C15
    assert mix(1234567 + golden) == 6457827717110365317
    assert mix(1234567 + 2 * golden) == 3203168211198807973


@pytest.mark.parametrize("shape", [(5, 7), (3, 150, 150)])  # many images are hashed at once, or one after the other
@pytest.mark.parametrize("kind", ["normal", "uniform", "symmetric"])
def test_numbers_of_an_image_do_not_depend_on_its_batch(kind: str, shape: tuple[int, ...]) -> None:
    def draw(*indices: int) -> torch.Tensor:
        return getattr(KeyedRandom(0, "a", torch.tensor(indices)), kind)(*shape)

    assert torch.equal(draw(6, 2), draw(*range(8))[[6, 2]])


def test_seed_purpose_index_and_draw_all_change_the_numbers() -> None:
    def first(seed: int, purpose: str, index: int) -> torch.Tensor:
        return KeyedRandom(seed, purpose, torch.tensor([index])).uniform(1000)

    base = KeyedRandom(0, "a", torch.tensor([0]))
    streams = [base.uniform(1000), base.uniform(1000), first(1, "a", 0), first(0, "b", 0), first(0, "a", 1)]
    correlations = torch.corrcoef(torch.cat(streams)).fill_diagonal_(0).abs()
    assert correlations.max() < 0.15  # 4.7 standard deviations of 1000 independent pairs


def test_uniform_and_normal_moments() -> None:
    random = KeyedRandom(3, "moments", torch.arange(64))
    uniform, normal = random.uniform(64, 256).double(), random.normal(64, 256).double()  # 2^20 numbers each
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < 5 * (1 / 12) ** 0.5 / 1024
    assert abs(uniform.var() - 1 / 12) < 0.0005
    assert abs(normal.mean()) < 5 / 1024
    assert abs(normal.var() - 1) < 0.01
    assert abs(normal.pow(4).mean() - 3) < 0.06
    assert torch.isfinite(normal).all()


def test_symmetric_fills_its_range_and_integers_theirs() -> None:
    random = KeyedRandom(3, "moments", torch.arange(4096))
    drawn, chosen = random.symmetric(256, limit=3.0), random.integers(3)  # 2^20 numbers
    assert drawn.dtype == torch.float32
    assert -3 <= drawn.min() < -2.999
    assert 2.999 < drawn.max() <= 3
    assert abs(drawn.mean(dtype=torch.float64)) < 5 * 3**0.5 / 1024
    assert abs(drawn.double().var() - 3) < 0.02
    assert (chosen.bincount() / 4096 - 1 / 3).abs().max() < 0.03


def test_no_global_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    KeyedRandom(0, "a", torch.arange(3)).normal(4)
    assert torch.equal(before, torch.get_rng_state())


def test_empty_batch() -> None:
    assert KeyedRandom(0, "a", torch.arange(0)).uniform(3, 2).shape == (0, 3, 2)
    assert KeyedRandom(0, "a", torch.arange(0)).symmetric(3, 1).shape == (0, 3, 1)
