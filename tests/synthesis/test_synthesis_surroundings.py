"""What surrounds a synthesis changes nothing in it: autocast, the default dtype, the memory format of the images."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnull.analysis.approximate import over_lambda, over_norm
from fastnull.analysis.exact import energy, leak
from fastnull.analysis.spectrum import jacobian_spectra
from fastnull.analysis.transfer import transfer
from fastnull.encoder import FrozenEncoder
from fastnull.nullspace import PatchNullspace
from fastnull.nullspace.pixels import PixelNullspace
from fastnull.synthesis import MODES, Noise, SynthesisConfig, measure_influence, synthesize
from fastnull.synthesis.gauss_newton import gauss_newton_step
from fastnull.synthesis.solvers import own_noise
from fastnull.synthesis.starts import draw_start, step_source
from fastnull.vit import SITES, NormalizedModel


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16 autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64 by default": float64_by_default,
}
# what a mode draws and solves beyond its defaults
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "universal": [{}, {"solver": "adamw", "limit_range": 0.5}, {"final_scale": True, "log_norm_weight": 0.1}],
    "per_image": [{"limit_range": 0.5}, {"on_unmet": "scale", "log_norm_weight": 0.1}],
    "boundary": [{"limit_range": 0.5, "step_range": 0.5}, {"objective": "prediction", "on_unmet": "scale"}],
}
PIXEL_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "universal": [{"smooth_limit": 0.1}],
    "per_image": [{"smooth_limit": 0.1}],
    "boundary": [{"smooth_limit": 0.1, "contrast": 0.2, "step_range": 0.5}],
}
CASES = [
    (mode, site, settings)
    for mode, site in itertools.product(MODES, SITES)
    for settings in (*SETTINGS[mode], *(PIXEL_SETTINGS[mode] if site == "pixels" else ()))
]
FEW = [(mode, site, SETTINGS[mode][0]) for mode, site in itertools.product(MODES, SITES)]


def made(encoder: FrozenEncoder, batches: list[Tensor], case: tuple[str, str, dict[str, Any]]) -> Noise:
    mode, site, settings = case
    limit = 0.1 if site == "pixels" else 1.0
    config = SynthesisConfig(mode=mode, site=site, limit=limit, count=2, steps=3, eps=0.01, **settings)
    return synthesize(encoder, batches, config)


def assert_same(mine: Noise, theirs: Noise) -> None:
    for name in ("tokens", "influence", "norm", "converged", "steps"):
        a, b = getattr(mine, name), getattr(theirs, name)
        assert a.dtype == b.dtype, name
        assert a.equal(b), f"{name} differs by {(a.double() - b.double()).abs().max():.3g}"


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_synthesis_is_the_same_bit_for_bit(
    vit: NormalizedModel, case: tuple[str, str, dict[str, Any]], backend: str, surroundings: str
) -> None:
    batches = list(torch.rand(9, 3, 16, 16).split(3))
    encoder = FrozenEncoder(vit, backend=backend, site=case[1])
    expected = made(encoder, batches, case)
    with SURROUNDINGS[surroundings]():
        assert_same(made(encoder, batches, case), expected)
        if case in FEW:  # made and proven inside, too
            assert_same(made(FrozenEncoder(vit, backend=backend, site=case[1]), batches, case), expected)


def in_memory(images: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "turned":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    return torch.cat([images, images], 3)[..., : images.shape[3]]  # "cropped"


@pytest.mark.parametrize("layout", ["channels_last", "turned", "cropped"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_images_of_any_memory_format_give_the_same_noise(
    vit: NormalizedModel, case: tuple[str, str, dict[str, Any]], backend: str, layout: str
) -> None:
    batches = list(torch.rand(9, 3, 16, 16).split(3))
    encoder = FrozenEncoder(vit, backend=backend, site=case[1])
    expected = made(encoder, batches, case)
    noise = made(encoder, [in_memory(batch, layout) for batch in batches], case)
    # a convolution may add up in another order
    torch.testing.assert_close(noise.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noise.influence, expected.influence, rtol=1e-3, atol=1e-6)


def test_an_expanded_batch_is_a_batch(vit: NormalizedModel) -> None:
    one = torch.rand(1, 3, 16, 16)
    config = SynthesisConfig(mode="boundary", site="pixels", limit=0.1)
    expanded = synthesize(vit, one.expand(4, -1, -1, -1), config)
    assert_same(expanded, synthesize(vit, one.repeat(4, 1, 1, 1), config))


@pytest.mark.parametrize("surroundings", ["channels_last", *SURROUNDINGS])
@pytest.mark.parametrize("mode", ["per_image", "boundary"])
@pytest.mark.parametrize("site", SITES)
def test_the_step_rules_are_the_same_bit_for_bit(
    vit: NormalizedModel, images: Tensor, site: str, mode: str, surroundings: str
) -> None:
    """As NullspaceAugment calls them in a training step."""
    encoder = FrozenEncoder(vit, site=site)
    tokens = encoder.embed(images)
    clean = encoder(tokens)
    config = SynthesisConfig(mode=mode, site=site, limit=0.3, steps=3, limit_range=0.5)

    def go(tokens: Tensor) -> tuple[Tensor, ...]:
        start = draw_start(tokens, config, step_source(3, 0, torch.arange(len(tokens)))).noise
        return own_noise(encoder, tokens, clean, start, config)

    expected = go(tokens)
    if surroundings == "channels_last":
        inside = go(in_memory(tokens, surroundings) if site == "pixels" else tokens.mT.contiguous().mT)
    else:
        with SURROUNDINGS[surroundings]():
            inside = go(tokens)
    for mine, theirs in zip(inside, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.equal(theirs)


def of_nullspaces(vit: NormalizedModel, images: Tensor) -> dict[str, Tensor]:
    """Everything that the exact nullspace computes, with square and other patches."""
    results: dict[str, Tensor] = {}
    weight = torch.randn(20, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for name, space in (("square", PatchNullspace.from_model(vit)), ("oblong", PatchNullspace.from_weight(weight))):
        results[f"{name} project"] = space.project(images)
        results[f"{name} sample"] = space.sample(images, 0.1, torch.Generator().manual_seed(1))
        tokens = torch.randn(2, 8, space.width, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
        results[f"{name} preimage"], results[f"{name} residual"] = space.preimage(tokens, (-0.1, 0.1), grid=(4, 2))
        results[f"{name} maximize"] = space.maximize(images[:1])
    for given in (None, torch.ones(2, 16, 32, dtype=torch.float32)):
        transform = PixelNullspace(vit, 16, count=3, noise=given)
        torch.manual_seed(5)
        results[f"transform {given is None}"] = transform(images)
        results[f"bank {given is None}"] = transform.bank
        results[f"residual {given is None}"] = transform.residual
    return results


def of_universal_noise(vit: NormalizedModel, images: Tensor) -> dict[str, Tensor]:
    """Its measured influence, and Gauss-Newton steps of one process and of several."""
    noise, *rows = torch.randn(8, 2, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    given = noise, rows[0].abs()[:, 0, :6], torch.stack(rows[:6], 1), 0.5, rows[6]
    encoder = FrozenEncoder(vit, dtype=torch.float32)
    return {
        "influence": measure_influence(encoder, synthesize(encoder, images, SynthesisConfig(count=2, steps=2)), images),
        "factorised": gauss_newton_step(*given),
        "conjugate gradients": gauss_newton_step(*given, lambda value: value),
    }


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("computed", [of_nullspaces, of_universal_noise])
def test_results_are_the_same_bit_for_bit(
    vit: NormalizedModel, images: Tensor, computed: Callable[..., dict[str, Tensor]], surroundings: str
) -> None:
    expected = computed(vit, images)
    with SURROUNDINGS[surroundings]():
        torch.testing.assert_close(computed(vit, images), expected, rtol=0, atol=0)


def test_a_float64_model_computes_in_float64(vit: NormalizedModel, images: Tensor) -> None:
    """In its own dtype, whatever the default: the guard of the tests above against a cast to float32 of everything."""
    noise = synthesize(vit.double(), images.double(), SynthesisConfig(mode="boundary"))
    assert noise.tokens.dtype == torch.float64


def test_analyses_are_the_same_under_a_float64_default(vit: NormalizedModel, images: Tensor) -> None:
    encoder, config = FrozenEncoder(vit), SynthesisConfig(limit=1.0, steps=2, eps=0.05)
    other = copy.deepcopy(vit)
    other.network.head.weight.data.mul_(0.5)
    noise = synthesize(encoder, images, config)

    def analysed() -> list[Any]:
        spectra = jacobian_spectra(vit, images[:2], 4)
        return [
            energy(PatchNullspace.from_model(vit), {"images": images}),
            leak(vit, images, scales=(0.1,)),
            over_norm(encoder, noise, images, (0.5, 1.0)),
            over_lambda(encoder, [images], images, config, (0.1,)),
            transfer({"one": vit, "other": other}, [images], images, {"universal": config}),
            *(spectrum.values.tolist() for spectrum in spectra),
        ]

    expected = analysed()
    with float64_by_default():
        assert analysed() == expected


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_leak_of_a_dtype_is_that_dtypes(vit: NormalizedModel, images: Tensor, surroundings: str) -> None:
    expected = leak(vit, images, scales=(0.1,))
    with SURROUNDINGS[surroundings]():
        assert leak(vit, images, scales=(0.1,)) == expected
