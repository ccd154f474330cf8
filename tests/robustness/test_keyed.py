"""Keyed random numbers: against splitmix64 in Python integers, and their distribution."""

from __future__ import annotations

import hashlib

import torch

from fastnull.robustness.keyed import KeyedRandom

MASK = (1 << 64) - 1


def mix(value: int) -> int:
    value &= MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def reference_uniform(seed: int, purpose: str, index: int, draw: int, position: int) -> float:
    golden = 0x9E3779B97F4A7C15
    base = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
    key = mix(mix((index + 1) * golden) ^ base)
    return ((mix(mix(key + (draw + 1) * golden) + (position + 1) * golden) >> 41) + 0.5) * 2.0**-23


def test_matches_splitmix_in_python_integers() -> None:
    # a negative and a large index: the products wrap
    indices = torch.tensor([0, 5, -3, 2**40])
    random = KeyedRandom(11, "test", indices)
    first, second = random.uniform(2, 3), random.uniform(4)
    for row, index in enumerate(indices.tolist()):
        assert first[row].flatten().tolist() == [reference_uniform(11, "test", index, 0, k) for k in range(6)]
        assert second[row].tolist() == [reference_uniform(11, "test", index, 1, k) for k in range(4)]


def test_splitmix_itself() -> None:
    # the published test vector: first outputs of splitmix64 seeded with 1234567
    golden = 0x9E3779B97F4A7C15
    assert mix(1234567 + golden) == 6457827717110365317
    assert mix(1234567 + 2 * golden) == 3203168211198807973


def test_numbers_of_an_image_do_not_depend_on_its_batch() -> None:
    whole = KeyedRandom(0, "a", torch.arange(8)).normal(5, 7)
    part = KeyedRandom(0, "a", torch.tensor([6, 2])).normal(5, 7)
    assert torch.equal(part, whole[[6, 2]])


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


def test_no_global_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    KeyedRandom(0, "a", torch.arange(3)).normal(4)
    assert torch.equal(before, torch.get_rng_state())


def test_empty_batch() -> None:
    assert KeyedRandom(0, "a", torch.arange(0)).uniform(3, 2).shape == (0, 3, 2)
