"""Watermarks: invisible to the model, detected after rounding to 8 bits, and only with the right key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnull.data.photos import photos
from fastnull.nullspace import PatchNullspace
from fastnull.nullspace.watermark import STRENGTH, detect, embed, key_mark, read
from fastnull.vit import NormalizedModel
from tests.conftest import run_example

pytest.importorskip("skimage")
pytest.importorskip("scipy")


@pytest.fixture
def model(make_vit: Callable[..., NormalizedModel]) -> NormalizedModel:
    return make_vit(img_size=32, patch_size=8, embed_dim=64)


@pytest.fixture
def space(model: NormalizedModel) -> PatchNullspace:
    return PatchNullspace.from_model(model)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """[52, 3, 32, 32]: four crops of every photograph."""
    return photos(32)[1].tensors[0][::10]


def in_8_bits(images: Tensor) -> Tensor:
    return (255 * images).round() / 255


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())


def test_the_outputs_do_not_change(model: NormalizedModel, space: PatchNullspace, pictures: Tensor) -> None:
    marked = embed(space, pictures, 7)
    assert marked.dtype == pictures.dtype
    assert float(marked.min()) >= 0
    assert float(marked.max()) <= 1
    moved = (marked - pictures).square().mean().sqrt()
    assert 0.5 * STRENGTH < float(moved) < 1.01 * STRENGTH  # less where pixels are at their bounds
    with torch.no_grad():
        before, after = model(pictures), model(marked)
        elsewhere = model((pictures + moved * torch.randn(pictures.shape)).clamp(0, 1))
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert float((elsewhere - before).norm() / before.norm()) > 1e-2


def test_found_by_its_key_after_rounding_and_by_no_other(space: PatchNullspace, pictures: Tensor) -> None:
    marked = in_8_bits(embed(space, pictures, 7))
    right, wrong, without = detect(space, marked, 7), detect(space, marked, 8), detect(space, pictures, 7)
    assert float(right.false_positive_rate.max()) < 1e-9
    assert float(wrong.false_positive_rate.min()) > 1e-4
    assert float(without.false_positive_rate.min()) > 1e-4
    informed = detect(space, marked, 7, original=pictures)
    assert float(informed.false_positive_rate.max()) < 1e-20
    assert float(informed.score.median()) > 0.99 > float(right.score.median())


def test_read_out_is_the_mark(space: PatchNullspace, pictures: Tensor) -> None:
    inner = 0.3 + 0.4 * pictures  # no pixel at its bounds: all of the mark fits
    mark = STRENGTH * key_mark(space, 3, (32, 32))
    marked = embed(space, inner, 3)
    torch.testing.assert_close(read(space, marked, inner), mark.double().expand_as(inner), atol=1e-6, rtol=0)
    assert float(cosine(read(space, in_8_bits(marked), inner), mark.expand_as(inner)).min()) > 0.99
    blind = cosine(read(space, marked), mark.expand_as(inner))
    assert bool((blind > cosine(read(space, inner), mark.expand_as(inner))).all())


def test_the_rate_of_false_positives_is_that_of_wrong_keys(space: PatchNullspace, pictures: Tensor) -> None:
    found = [detect(space, pictures[:8], key).false_positive_rate for key in range(400)]
    rates = torch.cat(found).sort().values  # [3200], uniform on (0, 1)
    ideal = (torch.arange(len(rates)) + 0.5) / len(rates)
    # Kolmogorov and Smirnov's distance, beyond which one uniform sample in 100,000 lies
    assert float((rates - ideal).abs().max()) < math.sqrt(math.log(2e5) / 2 / len(rates))


def test_pictures_that_are_not_whole_patches(space: PatchNullspace) -> None:
    pictures = photos(36)[1].tensors[0][::10]  # [52, 3, 36, 36]: 4 patches of 8, and 4 pixels more
    marked = embed(space, pictures, 7)
    assert torch.equal(marked[..., 32:], pictures[..., 32:])
    assert float(detect(space, in_8_bits(marked), 7).false_positive_rate.max()) < 1e-9
    # the border is no dimension of the nullspace: scores and rates are those of the pictures without it
    pattern = torch.randn(3, 36, 36)
    found = detect(space, pictures, pattern, original=pictures.flip(0))
    inner = pictures[..., :32, :32]
    expected = detect(space, inner, pattern[..., :32, :32], original=inner.flip(0))
    torch.testing.assert_close(found.score, expected.score)
    torch.testing.assert_close(found.false_positive_rate, expected.false_positive_rate)


def test_a_picture_as_a_mark(space: PatchNullspace, pictures: Tensor) -> None:
    hosts, target, rest = pictures[:4], pictures[20], pictures[24:]
    marked = embed(space, hosts, target, strength=0.1)
    found = detect(space, marked, target, unmarked=rest)
    assert found.false_positive_rate.tolist() == [1 / (1 + len(rest))] * 4
    plain = detect(space, hosts, target, unmarked=rest)
    assert float(plain.false_positive_rate.min()) > 1 / (1 + len(rest))


def test_bad_requests(space: PatchNullspace, pictures: Tensor) -> None:
    for mark in (True, "key", 1.5):
        with pytest.raises(TypeError, match="mark must be a key"):
            embed(space, pictures, mark)
    with pytest.raises(ValueError, match=r"mark must have shape \[3, 32, 32\] or \[52, 3, 32, 32\]; got \[3, 16, 16\]"):
        embed(space, pictures, torch.zeros(3, 16, 16))
    noise = torch.rand(1, 3, 32, 32)
    seen = (noise - space.project(noise))[0]
    with pytest.raises(ValueError, match="mark has no part in the nullspace"):
        embed(space, pictures, seen)
    with pytest.raises(ValueError, match="strength must be > 0"):
        embed(space, pictures, 1, strength=0)
    with pytest.raises(ValueError, match=r"images must be pixels in \[0, 1\]"):
        detect(space, pictures + 1, 1)
    with pytest.raises(ValueError, match="original must have the images' shape"):
        read(space, pictures, pictures[:1])
    with pytest.raises(ValueError, match="give one of the two"):
        detect(space, pictures, 1, pictures, unmarked=pictures)
    with pytest.raises(ValueError, match="no nullspace"):
        embed(PatchNullspace.from_weight(torch.randn(200, 3, 8, 8)), pictures, 1)


def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    # with patches of 16 it takes a second
    output = run_example("watermark.py", "--model", "vit_tiny_patch16_224", "--out", str(tmp_path / "seen.png"))
    assert (tmp_path / "seen.png").stat().st_size > 10_000
    rates = [float(rate) for rate in re.findall(r"false positive rate (\S+)", output)]
    assert rates[0] < 1e-9
    assert min(rates[1:]) > 1e-3
