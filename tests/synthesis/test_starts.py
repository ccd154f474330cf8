"""What noise starts from: range of strengths, smooth fields, and the same numbers for a part of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnull.augment import NullspaceAugment
from fastnull.encoder import FrozenEncoder
from fastnull.finetune.config import FinetuneConfig
from fastnull.models import create_model
from fastnull.rng import KeyedRandom, Place, generator
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.synthesis.config import MODES
from fastnull.synthesis.solvers import norms
from fastnull.synthesis.starts import (
    GRIDS,
    MOST_CELLS,
    MOST_CONTRAST,
    _smooth,
    at_mean_contrast,
    draw_start,
    start_noise,
    step_source,
)
from fastnull.vit import NormalizedModel

SHAPE = (400, 3, 16, 16)


def start(**changes: Any) -> torch.Tensor:
    config = SynthesisConfig(mode="boundary", site="pixels", **{"smooth_limit": 0.0, **changes})
    return start_noise(SHAPE[1:], config, source(SHAPE[0]), torch.float32)


def source(count: int, device: str = "cpu") -> KeyedRandom:
    return step_source(1, 2, torch.arange(count, device=device))


def test_the_plain_start_is_uniform_of_one_limit() -> None:
    assert torch.equal(start(limit=0.25), source(SHAPE[0]).symmetric(*SHAPE[1:], limit=0.25))


class OnDevice(TorchDispatchMode):
    """Fails where an operator draws from a generator, reads a value, or makes a tensor anywhere else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not {"nondeterministic_seeded", "data_dependent_output", "dynamic_output_shape"} & {
            tag.name for tag in func.tags
        }, func
        result = func(*args, **(kwargs or {}))
        assert all(value.device.type == "meta" for value in tree_leaves(result) if isinstance(value, Tensor)), func
        return result


@pytest.mark.parametrize("site", ["patch", "pixels"])
def test_starts_are_drawn_on_the_device_without_waiting_for_it(site: str) -> None:
    config = SynthesisConfig(mode="boundary", site=site, limit_range=0.5, step_range=0.5)
    tokens = torch.empty(4, 3, 16, 16, device="meta")
    with OnDevice():
        drawn = draw_start(tokens, config, source(4, "meta"))
    assert drawn.noise.shape == tokens.shape
    assert drawn.step_size.shape == (4,)
    with pytest.raises(AssertionError), OnDevice():
        torch.rand(2, device="meta")


def test_fields_are_what_interpolation_gives() -> None:
    fields = _smooth((3, 24, 17), source(40))
    again = source(40)
    cells, coarse = 2 ** again.integers(GRIDS), again.symmetric(MOST_CELLS, MOST_CELLS).mT
    for field, count, values in zip(fields, cells.tolist(), coarse, strict=True):
        wanted = F.interpolate(values[None, None, :count, :count], size=(24, 17), mode="bilinear")
        torch.testing.assert_close(field[None], wanted)


def test_limits_are_spread_over_the_images() -> None:
    strongest = start(limit=0.25, limit_range=0.6).abs().flatten(1).amax(1) / 0.25
    # 768 numbers of an image come close to their limit
    assert 0.39 < float(strongest.min()) < 0.45
    assert 0.95 < float(strongest.max()) <= 1
    assert float(strongest.mean()) == pytest.approx(0.7, abs=0.03)


def test_smooth_fields_are_smooth_and_as_strong_as_asked() -> None:
    fields = start(limit=0.0, smooth_limit=0.25)
    strongest = fields.abs().flatten(1).amax(1)
    assert 0.2 < float(strongest.max()) <= 0.25
    assert float(strongest.min()) < 0.02  # each image has a strength of its own
    assert fields.mean().abs() < 0.01
    # grid of one cell: a shift of the colours; of eight: twice as fine as the image's halves, and still no pixel noise
    flat = fields.flatten(2).std(2).amax(1) < 1e-6
    assert float(flat.float().mean()) == pytest.approx(1 / GRIDS, abs=0.08)
    rough = (fields - F.avg_pool2d(fields, 3, 1, 1, count_include_pad=False)).square().mean()
    white = start(limit=float(fields.std()) * 3**0.5)
    assert rough < 0.1 * (white - F.avg_pool2d(white, 3, 1, 1, count_include_pad=False)).square().mean()


def test_the_key_decides_and_parts_equal_the_whole() -> None:
    model = create_model("vit_digits").train()
    images = torch.rand(6, 3, 16, 16)
    config = SynthesisConfig(
        mode="boundary", site="pixels", limit=0.1, limit_range=1.0, smooth_limit=0.2, steps=1, seed=3
    )

    def draw(rows: torch.Tensor | None, step: int) -> torch.Tensor:
        augment = NullspaceAugment(model, "random", config=config)
        if rows is None:
            return augment.at(step).draw(images)
        return augment.at(step, Place(rows, len(images))).draw(images[rows])

    whole = draw(None, 7)
    torch.testing.assert_close(draw(None, 7), whole, rtol=0, atol=0)
    assert not torch.allclose(draw(None, 8), whole)
    rows = torch.tensor([1, 4])
    torch.testing.assert_close(draw(rows, 7), whole[rows], rtol=0, atol=0)
    assert float((images + whole).min()) >= 0
    assert float((images + whole).max()) <= 1


def test_synthesis_starts_there_too() -> None:
    model = create_model("vit_digits")
    grey = torch.full((4, 3, 16, 16), 0.5)
    config = SynthesisConfig(mode="boundary", site="pixels", limit=0.0, smooth_limit=0.25, contrast=0.0, step_size=1e-6)
    noise = synthesize(model, grey, config).tokens
    assert float(noise.abs().amax()) > 0.02
    assert float(noise.diff(dim=3).abs().amax()) < 0.25  # neighbours hardly differ


def test_steps_are_spread_over_the_images_and_parts_get_those_of_the_whole() -> None:
    model = create_model("vit_digits").train()
    images = torch.full((200, 3, 16, 16), 0.5)
    config = SynthesisConfig(
        mode="boundary", site="pixels", limit=0.0, smooth_limit=0.0, contrast=0.0, step_size=0.1, step_range=0.8
    )

    def draw(rows: torch.Tensor | None) -> torch.Tensor:
        augment = NullspaceAugment(model, config=config, fraction=0.0)
        if rows is None:
            return augment.draw(images)
        return augment.at(0, Place(rows, len(images))).draw(images[rows])

    # the loss of the prediction has a gradient at the image itself, where a distance has none: no start is needed
    whole = draw(None)
    lengths = whole.abs().flatten(1).amax(1)
    assert 0.02 <= float(lengths.min()) < 0.03
    assert 0.09 < float(lengths.max()) <= 0.1
    rows = torch.tensor([3, 150])
    torch.testing.assert_close(draw(rows), whole[rows])
    assert draw_start(images, replace(config, step_range=0.0), source(200)).step_size == 0.1  # one for all


@pytest.mark.parametrize("limit_range", [0.0, 0.8])
def test_a_step_is_a_tenth_of_the_norm_of_a_start(limit_range: float) -> None:
    config = SynthesisConfig(mode="boundary", limit=0.5, limit_range=limit_range, contrast=0.0)
    noise, size = draw_start(torch.zeros(400, 16, 32), config, source(400))
    assert size == pytest.approx(0.1 * float(norms(noise).mean()), rel=0.03)
    assert draw_start(noise[:3], config, source(3)).step_size == size
    given = draw_start(noise[:2], config, source(2), given=noise[:2])
    assert float(given.step_size) == pytest.approx(0.1 * float(norms(noise[:2]).mean()))


def test_noise_is_in_proportion_to_contrast_and_parts_get_that_of_the_whole() -> None:
    model = create_model("vit_digits").train()
    unit = torch.rand(5, 3, 16, 16, generator=generator(1)) - 0.5
    unit = unit / unit.flatten(1).std(1).view(-1, 1, 1, 1)
    images = 0.5 + torch.tensor([0.0, 0.02, 0.05, 0.1, 0.2]).view(-1, 1, 1, 1) * unit
    config = SynthesisConfig(
        mode="boundary", site="pixels", limit=0.004, smooth_limit=0.0, step_size=0.01, step_range=0.0, contrast=0.1
    )

    def draw(config: SynthesisConfig, rows: torch.Tensor) -> torch.Tensor:
        augment = NullspaceAugment(model, config=config, fraction=0.0)
        return augment.at(0, Place(rows, len(images))).draw(images[rows])

    # a sign step from uniform noise: longest where both agree
    factors = torch.tensor([0.0, 0.2, 0.5, 1.0, MOST_CONTRAST])
    whole = draw(config, torch.arange(5))
    for noise in (whole, synthesize(model, images, config).tokens):
        torch.testing.assert_close(noise.abs().flatten(1).amax(1), 0.014 * factors, rtol=0.02, atol=1e-6)
    rows = torch.tensor([1, 4])
    torch.testing.assert_close(draw(config, rows), whole[rows])
    plain = draw(replace(config, contrast=0.0), torch.arange(5))
    torch.testing.assert_close(plain.abs().flatten(1).amax(1), torch.full((5,), 0.014), rtol=0.02, atol=0)


@pytest.mark.parametrize(("site", "contrast"), [("patch", 1.0), ("block0", 2.0), ("pixels", 0.2)])
@pytest.mark.parametrize("mode", MODES)
def test_lengths_are_relative_to_contrast(vit: NormalizedModel, mode: str, site: str, contrast: float) -> None:
    images = 0.4 + 0.2 * torch.rand(4, 3, 16, 16, generator=generator(1))
    encoder = FrozenEncoder(vit, site=site)
    scale = encoder.embed(images).flatten(1).std(1) / contrast  # [B]
    assert (scale - 1).abs().min() > 0.1
    lengths: dict[str, Any] = {"limit": 0.05, ("step_size" if mode == "boundary" else "lr"): 0.01}
    plain: dict[str, Any] = {"steps": 2, "stop": "never", "smooth_limit": 0.0, "step_range": 0.0, "eps": 1e-9}
    config = SynthesisConfig(mode=mode, site=site, contrast=contrast, **lengths, **plain)
    check: dict[str, Any] = {"check": images} if mode == "universal" else {}

    def absolute(factor: Tensor) -> Tensor:
        scaled = {name: float(factor) * value for name, value in lengths.items()}
        return synthesize(encoder, images, replace(config, contrast=0.0, **scaled), **check).tokens

    if mode == "universal":
        expected = absolute(scale.mean())
    else:
        expected = torch.stack([absolute(factor)[image] for image, factor in enumerate(scale)])
    noise = synthesize(encoder, images, config, **check).tokens
    torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-6)
    assert noise.abs().max() > 0


def test_universal_lengths_at_the_mean_contrast_are_valid() -> None:
    pixels = torch.rand(4, 3, 16, 16, generator=generator(1))  # of contrast 0.29
    config = SynthesisConfig(site="pixels", limit=0.8, contrast=0.1, lr=0.1)
    found = at_mean_contrast(config, [pixels], None)
    assert (found.limit, found.contrast) == (1.0, 0.0)
    assert found.rate == pytest.approx(0.15)
    with pytest.raises(ValueError, match=r"check images have no contrast at site 'pixels'.*contrast=0"):
        at_mean_contrast(config, [torch.full_like(pixels, 0.5)], None)


def test_the_range_of_steps_is_that_of_boundary_noise() -> None:
    tokens = torch.rand(4, 9, 8, generator=generator(1))
    sizes = {}
    for mode in ("boundary", "per_image"):
        config = SynthesisConfig(mode=mode, step_range=0.5, step_size=1.0, lr=1.0, contrast=0.0)
        size = draw_start(tokens, config, step_source(0, 0, torch.arange(4))).step_size
        sizes[mode] = torch.as_tensor(size).unique()
    assert len(sizes["boundary"]) == 4
    assert sizes["per_image"].tolist() == [1.0]


@torch.no_grad()
def test_a_model_cannot_outgrow_noise_relative_to_its_tokens() -> None:
    model = create_model("vit_digits").train()
    images = torch.rand(4, 3, 16, 16, generator=generator(1))

    def ratio(contrast: float) -> Tensor:
        augment = NullspaceAugment(model, config=SynthesisConfig(mode="random", limit=0.5, contrast=contrast))
        tokens = augment.encoder.embed(images)
        return norms(augment.at(0, Place(torch.arange(4), 4)).draw(tokens)) / norms(tokens)

    relative, absolute = ratio(1.0), ratio(0.0)
    for parameter in model.network.patch_embed.parameters():
        parameter.mul_(10)
    torch.testing.assert_close(ratio(1.0), relative)
    torch.testing.assert_close(ratio(0.0), absolute / 10)


@torch.no_grad()
def test_noise_along_the_predictions_loss_moves_the_prediction_most() -> None:
    model = create_model("vit_digits").eval()
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    clean = model(images)
    predicted = clean.argmax(1)

    def loss(objective: str) -> float:
        config = SynthesisConfig(
            mode="boundary",
            site="pixels",
            limit=2 / 255,
            smooth_limit=0.0,
            contrast=0.0,
            step_size=8 / 255,
            step_range=0.0,
            eps=1.9,
            objective=objective,
        )
        noise = synthesize(model, images, config).tokens
        return float(F.cross_entropy(model(images + noise), predicted))

    assert loss("prediction") > max(loss("l2"), float(F.cross_entropy(clean, predicted)))


def test_settings_reach_the_synthesis() -> None:
    asked = {"limit": 0.1, "limit_range": 0.5, "smooth_limit": 0.2, "objective": "l2_squared"}
    synthesis = FinetuneConfig(augment="boundary", site="pixels", noise=asked, seed=3).synthesis()
    assert synthesis is not None
    # what is not asked for is the recommended value of mode and site
    assert synthesis == SynthesisConfig.recommended("boundary", "pixels", seed=3, **asked)
    assert synthesis.step_size == 12 / 255
