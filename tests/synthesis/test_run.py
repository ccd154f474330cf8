"""Synthesis: the published loop as an oracle, what each mode promises, and what it leaves as it found it."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastnull.encoder import FrozenEncoder
from fastnull.synthesis import (
    MODES,
    EpsilonNotMetError,
    SynthesisConfig,
    SynthesisInterrupted,
    SynthesisOutOfMemoryError,
    measure_influence,
    solvers,
    synthesize,
)
from fastnull.synthesis import run as synthesis
from fastnull.synthesis.objective import influence
from fastnull.synthesis.run import NoiseNotFiniteError
from fastnull.synthesis.solvers import perturb
from fastnull.vit import SITES, NormalizedModel

START: dict[str, Any] = {"steps": 1, "limit": 3.0, "contrast": 0.0, "lr": 1e-30, "stop": "never"}
"""A synthesis that ends where the published loop starts."""


def published_loop(model: NormalizedModel, loader: list[Tensor], start: Tensor, squared: bool, eps: float) -> Tensor:
    """The published loop from its description, in a few lines: nothing of the package but the model's own modules."""
    network = model.network.eval()
    noise = start.clone().requires_grad_(True)
    rounds, batches = 3, int(0.1 * len(loader))
    optimizer = torch.optim.AdamW([noise], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader) * rounds)
    for _ in range(rounds):
        for images in loader[:batches]:
            patches = network.patch_embed((images - 0.5) / 0.5)

            def rest(x: Tensor) -> Tensor:
                return network.forward_head(network.norm(network.blocks(network._pos_embed(x))))

            with torch.no_grad():
                clean = rest(patches)
            noisy = rest(patches + noise)
            if ((clean.softmax(-1) - noisy.softmax(-1)) ** 2).sum(-1).mean() < eps:
                return noise.detach()
            length = (noisy - clean).norm(dim=-1)
            loss = (length**2 if squared else length).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return noise.detach()


@pytest.mark.parametrize(("preset", "squared"), [("finetune", True), ("first", False)])
def test_published_preset_is_the_published_loop(vit: NormalizedModel, preset: str, squared: bool) -> None:
    vit = vit.double()
    loader = [torch.rand(4, 3, 16, 16, dtype=torch.float64) for _ in range(70)]  # 3 rounds x 7 batches = 21 steps
    config = SynthesisConfig.published(preset, eps=1e-9, seed=3)
    start = synthesize(vit, loader[:1], SynthesisConfig(**START, seed=3)).tokens
    ours = synthesize(vit, loader, config)
    theirs = published_loop(vit, loader, start, squared, eps=1e-9)
    assert ours.steps.item() == 21
    assert (ours.tokens - start).abs().max() > 0.5
    assert (ours.tokens - theirs).abs().max() < 1e-10


def test_published_preset_stops_where_the_published_loop_does(vit: NormalizedModel) -> None:
    vit = vit.double()
    loader = [torch.rand(4, 3, 16, 16, dtype=torch.float64) for _ in range(70)]
    start = synthesize(vit, loader[:1], SynthesisConfig(**START)).tokens
    # an eps that is met on the way: just above the least influence of a run that is never stopped
    free = synthesize(vit, loader, SynthesisConfig.published("first", eps=1e-9))
    eps = min(record["influence"] for record in free.history[:-1]) * (1 + 1e-6)
    ours = synthesize(vit, loader, SynthesisConfig.published("first", eps=eps))
    assert 0 < ours.steps.item() < 21
    torch.testing.assert_close(ours.tokens, published_loop(vit, loader, start, False, eps), rtol=0, atol=1e-10)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_site_moves_influence_towards_eps(
    vit: NormalizedModel, images: Tensor, mode: str, site: str
) -> None:
    limit = 0.3 if site == "pixels" else 1.0
    # the start: eps = 2 is met at once, and a boundary step of 1e-9 moves nothing
    plain: dict[str, Any] = {"objective": "l2", "smooth_limit": 0.0, "contrast": 0.0, "step_range": 0.0}
    at_once = SynthesisConfig(mode=mode, site=site, limit=limit, steps=1, eps=2.0, step_size=1e-9, **plain)
    before = synthesize(vit, images, at_once, check=images)
    eps = 0.3 * before.influence.mean().item()
    size = 4 / 255 if site == "pixels" else None
    config = SynthesisConfig(mode=mode, site=site, limit=limit, lr=0.03, steps=25, eps=eps, step_size=size, **plain)
    noise = synthesize(vit, images, config, check=images)
    count = 1 if mode == "universal" else len(images)
    shape = {"patch": (16, 32), "block0": (17, 32), "pixels": (3, 16, 16)}[site]
    assert noise.tokens.shape == (count, *shape)
    assert (noise.influence.mean() - eps).abs() < (before.influence.mean() - eps).abs()
    torch.testing.assert_close(noise.norm, noise.tokens.flatten(1).norm(dim=1))
    assert noise.site == site


def test_reported_influence_is_that_of_the_noise(vit: NormalizedModel, images: Tensor) -> None:
    encoder = FrozenEncoder(vit)
    tokens = encoder.embed(images)
    for mode in ("per_image", "boundary"):
        noise = synthesize(vit, images, SynthesisConfig(mode=mode, limit=1.0, steps=4))
        expected = influence(encoder(tokens), encoder(tokens + noise.tokens))
        torch.testing.assert_close(noise.influence, expected)
    bank = synthesize(vit, images[:6], SynthesisConfig(count=2, limit=1.0, steps=4), check=images[6:])
    torch.testing.assert_close(bank.influence, measure_influence(vit, bank, images[6:]))


def test_check_images_are_held_out(vit: NormalizedModel, images: Tensor) -> None:
    config = SynthesisConfig(limit=1.0, contrast=0.0, steps=5)
    batches = [images[:4], images[4:]]
    noise = synthesize(vit, batches, config)
    assert noise.metadata["check"] == "held-out batches"
    torch.testing.assert_close(noise.influence, measure_influence(vit, noise, images[4:]))
    # the held-out batch does not steer the noise, except through its mean contrast
    other = synthesize(vit, [images[:4], 1 - images[4:]], config)
    assert torch.equal(other.tokens, noise.tokens)
    assert not torch.equal(other.influence, noise.influence)


def test_stop_is_decided_on_the_check_images(vit: NormalizedModel) -> None:
    batches = list(torch.rand(8, 16, 3, 16, 16))
    config = SynthesisConfig(limit=1.0, eps=0.05, steps=400, lr=0.02)
    noise = synthesize(vit, batches, config)
    assert noise.converged.item()
    assert noise.influence.item() < 0.05
    assert 0 < noise.steps.item() < 400
    # a minibatch may be below eps before the check images are
    earlier = synthesize(vit, batches, replace(config, stop="batch"))
    assert earlier.steps.item() <= noise.steps.item()


def test_boundary_noise_comes_close_to_eps_from_both_sides(vit: NormalizedModel, images: Tensor) -> None:
    eps = 0.02
    for limit in (0.02, 1.5):
        config = SynthesisConfig(mode="boundary", limit=limit, eps=eps, steps=60, step_size=0.1)
        start = synthesize(vit, images, replace(config, steps=1, step_size=1e-9))
        assert bool((start.influence < eps).all() if limit < 1 else (start.influence > eps).any())
        noise = synthesize(vit, images, config)
        assert noise.converged.float().mean() > 0.7


def test_bank_members_differ_and_do_not_depend_on_the_size_of_the_bank(vit: NormalizedModel, images: Tensor) -> None:
    two, three = (
        synthesize(vit, images, SynthesisConfig(count=count, limit=1.0, steps=3, eps=1e-9)) for count in (2, 3)
    )
    assert not torch.equal(two.tokens[0], two.tokens[1])
    torch.testing.assert_close(three.tokens[:2], two.tokens)


def test_same_seed_same_noise(vit: NormalizedModel, images: Tensor) -> None:
    for mode in MODES:
        config = SynthesisConfig(mode=mode, limit=1.0, steps=3, seed=7)
        first = synthesize(vit, images, config).tokens
        torch.rand(3)
        assert torch.equal(synthesize(vit, images, config).tokens, first)
        assert not torch.equal(synthesize(vit, images, replace(config, seed=0)).tokens, first)


def test_log_norm_term_makes_the_noise_longer(vit: NormalizedModel, images: Tensor) -> None:
    settings: dict[str, Any] = {"limit": 0.5, "steps": 20, "stop": "never", "lr": 0.02}
    plain = synthesize(vit, images, SynthesisConfig(**settings))
    longer = synthesize(vit, images, SynthesisConfig(log_norm_weight=2.0, **settings))
    assert longer.norm.item() > plain.norm.item() * 1.02


def test_schedule_really_decays(vit: NormalizedModel, images: Tensor) -> None:
    # the last of 10 cosine steps is tiny, that of the constant schedule is not
    def last_move(schedule: str) -> float:
        config = {"limit": 1.0, "stop": "never", "schedule": schedule}
        ten = synthesize(vit, images, SynthesisConfig(steps=10, **config)).history
        return abs(ten[-1]["norm"] - ten[-2]["norm"])

    assert last_move("cosine") < 0.3 * last_move("constant")


def test_unmet_eps_is_kept_scaled_or_raised(vit: NormalizedModel, images: Tensor) -> None:
    settings: dict[str, Any] = {"limit": 3.0, "steps": 2, "eps": 1e-3}
    for mode in ("universal", "per_image"):
        kept = synthesize(vit, images, SynthesisConfig(mode=mode, **settings))
        assert not kept.converged.any()
        scaled = synthesize(vit, images, SynthesisConfig(mode=mode, on_unmet="scale", **settings))
        assert scaled.converged.all()
        # bisection stops just below eps, not at zero
        assert scaled.influence.min() > 0.5e-3
        with pytest.raises(EpsilonNotMetError, match=r"did not meet eps = 0.001") as caught:
            synthesize(vit, images, SynthesisConfig(mode=mode, on_unmet="raise", **settings))
        assert torch.equal(caught.value.noise.tokens, kept.tokens)


def test_pixel_noise_keeps_pixels_valid(vit: NormalizedModel, images: Tensor) -> None:
    for mode in ("per_image", "boundary"):
        noise = synthesize(vit, images, SynthesisConfig(mode=mode, site="pixels", limit=0.5, steps=3))
        noisy = images + noise.tokens
        assert noisy.min() >= -1e-6
        assert noisy.max() <= 1 + 1e-6


def test_model_and_generators_are_left_as_found(vit: NormalizedModel, images: Tensor) -> None:
    vit.train()
    vit.network.blocks[1].eval()
    vit.network.cls_token.requires_grad_(False)
    modes = [module.training for module in vit.modules()]
    flags = [parameter.requires_grad for parameter in vit.parameters()]
    weights = [parameter.clone() for parameter in vit.parameters()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    loader = DataLoader(TensorDataset(images), 4, shuffle=True)
    for mode in MODES:
        synthesize(vit, loader, SynthesisConfig(mode=mode, limit=1.0, steps=3))
    assert [module.training for module in vit.modules()] == modes
    assert [parameter.requires_grad for parameter in vit.parameters()] == flags
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, vit.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()


def test_loader_with_labels_is_read_anew_each_round(vit: NormalizedModel, images: Tensor) -> None:
    loader = DataLoader(TensorDataset(images, torch.zeros(8, dtype=torch.long)), 4)
    config = SynthesisConfig(limit=1.0, rounds=3, eps=1e-9)
    noise = synthesize(vit, loader, config)
    assert noise.steps.item() == 6
    assert noise.metadata["check"] == "first batches of the loader"
    streamed = synthesize(vit, loader, config, check=images)
    listed = synthesize(vit, [images[:4], images[4:]], config, check=images)
    assert torch.equal(streamed.tokens, listed.tokens)


def test_start_continues_a_noise(vit: NormalizedModel, images: Tensor) -> None:
    noise = synthesize(vit, images, SynthesisConfig(limit=1.0, steps=2))
    again = synthesize(vit, images, SynthesisConfig(limit=1.0, steps=1, lr=1e-30, stop="never"), start=noise)
    torch.testing.assert_close(again.tokens, noise.tokens)
    with pytest.raises(ValueError, match=r"start must have shape \[2, 16, 32\]; got \[1, 16, 32\]"):
        synthesize(vit, images, SynthesisConfig(count=2), start=noise)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda start: start[:, :1], ValueError, r"start must have shape \[8, 16, 32\]; got \[8, 1, 32\]"),
        (lambda start: start[:1], ValueError, "start must"),
        (lambda start: torch.cat([start, start]), ValueError, "start must"),
        (lambda start: start.char(), TypeError, "start must be of a floating dtype; got torch.int8"),
        (lambda start: start.to(torch.complex64), TypeError, "start must be of a floating dtype"),
        (lambda start: start / 0, ValueError, "start must be finite"),
    ],
)
def test_a_start_that_does_not_fit_is_named(
    vit: NormalizedModel,
    images: Tensor,
    mode: str,
    change: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
) -> None:
    start = change(torch.rand(8, 16, 32))
    with pytest.raises(error, match=message):
        synthesize(vit, images, SynthesisConfig(mode=mode, count=8), start=start)


def test_too_many_starts_for_a_loader_are_named(vit: NormalizedModel, images: Tensor) -> None:
    loader = DataLoader(TensorDataset(images), batch_size=3)
    start = torch.rand(9, 16, 32)
    with pytest.raises(ValueError, match=r"start must hold one noise per image \(8\); it holds 9"):
        synthesize(vit, loader, SynthesisConfig(mode="boundary"), start=start)
    fits = synthesize(vit, loader, SynthesisConfig(mode="boundary"), start=start[:8])
    by_batches = synthesize(vit, images.split(3), SynthesisConfig(mode="boundary"), start=start[:8])
    assert fits.tokens.equal(by_batches.tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mine", "theirs"), [("patch", "block0"), ("block0", "patch"), ("pixels", "patch")])
def test_a_start_of_another_site_is_refused(
    vit: NormalizedModel, images: Tensor, mode: str, mine: str, theirs: str
) -> None:
    noise = synthesize(vit, images, SynthesisConfig(mode=mode, site=theirs, limit=0.1, steps=1))
    with pytest.raises(
        ValueError, match=rf"start must be noise of site '{mine}', as config\.site; it is of '{theirs}'"
    ):
        synthesize(vit, images, SynthesisConfig(mode=mode, site=mine, limit=0.1), start=noise)
    encoder = FrozenEncoder(vit, site=mine)
    with pytest.raises(ValueError, match=f"the noise is of site '{theirs}' but the encoder was made for site '{mine}'"):
        measure_influence(encoder, noise, images)


@pytest.mark.parametrize("shape", [(1, 32), (16, 1), (1, 1), (17, 32)])
def test_noise_of_one_token_is_not_spread_over_all(
    vit: NormalizedModel, images: Tensor, shape: tuple[int, int]
) -> None:
    noise = synthesize(vit, images, SynthesisConfig(steps=1))
    cut = replace(noise, tokens=torch.ones(1, *shape))
    with pytest.raises(ValueError, match=r"noise must have shape \[\.\.\., 16, 32\].*site 'patch'; got"):
        measure_influence(vit, cut, images)
    encoder = FrozenEncoder(vit)
    with pytest.raises(ValueError, match=r"noise must have shape \[\.\.\., 16, 32\]"):
        perturb(encoder, encoder.embed(images), torch.ones(8, *shape))


@pytest.mark.parametrize("mode", ["per_image", "boundary"])
def test_a_mean_over_processes_is_for_the_universal_mode(vit: NormalizedModel, images: Tensor, mode: str) -> None:
    with pytest.raises(ValueError, match=rf"mean is for mode 'universal'; got config\.mode='{mode}'"):
        synthesize(vit, images, SynthesisConfig(mode=mode), mean=lambda value: value)


# a loader's sizes are known only when it is read
@pytest.mark.parametrize("source", [list, functools.partial(DataLoader, batch_size=None)])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_two_image_sizes_are_refused_by_both(
    make_vit: Callable[..., NormalizedModel], mode: str, site: str, source: Callable[[list[Tensor]], Any]
) -> None:
    """A model may take any size; noise has one."""
    vit = make_vit(dynamic_img_size=True)
    small, large = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 24, 16)
    config = SynthesisConfig(mode=mode, site=site, limit=0.1, steps=3, stop="never")
    assert len(synthesize(vit, source([large] * 3), config)) == (1 if mode == "universal" else 6)
    calls: list[int] = []
    vit.network.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    message = "all images of a synthesis, the check images too, must be of one size; got 16x16 and 24x16"
    with pytest.raises(ValueError, match=message):
        synthesize(vit, source([small, small, large]), config)
    if source is list:
        assert not calls, "refused before any work"
    if mode == "universal":
        with pytest.raises(ValueError, match=r"must be of one size; got (16x16 and 24x16|24x16 and 16x16)"):
            synthesize(vit, source([small, small]), config, check=[large])


def cpu_out_of_memory() -> Exception:
    """torch's own error of a CPU: a RuntimeError that has no class of its own."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    return error.value


ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory: can't allocate memory"),
    "cpu": cpu_out_of_memory,
    "python": lambda: MemoryError("can't allocate memory"),
    "a bug": lambda: RuntimeError("a bug"),
}


@pytest.mark.parametrize("mode", ["per_image", "boundary"])
@pytest.mark.parametrize("good", [0, 2])
def test_out_of_memory_keeps_the_images_that_are_done(
    vit: NormalizedModel, images: Tensor, good: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = solvers.own_noise, iter(range(9))

    def failing(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        if next(calls) == good:
            raise MemoryError("can't allocate memory")
        return real(*args)

    monkeypatch.setattr(solvers, "own_noise", failing)
    config = SynthesisConfig(mode=mode, limit=0.25, steps=2)
    with pytest.raises(
        SynthesisOutOfMemoryError, match=rf"after {2 * good} images: use smaller batches.*can't allocate memory"
    ) as error:
        synthesize(vit, images.split(2), config)
    monkeypatch.setattr(solvers, "own_noise", real)
    kept = error.value.noise
    assert (kept is None) == (good == 0)
    if kept is not None:
        assert torch.equal(kept.tokens, synthesize(vit, images[:4].split(2), config).tokens)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("mode", MODES)
def test_errors_of_the_first_embedding(
    vit: NormalizedModel, images: Tensor, mode: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory has an error of its own on every device; a bug stays what it is."""
    monkeypatch.setattr(FrozenEncoder, "embed", Mock(side_effect=ERRORS[kind]()))
    if kind == "a bug":
        with pytest.raises(RuntimeError, match=r"^a bug$"):
            synthesize(vit, images, SynthesisConfig(mode=mode))
        return
    with pytest.raises(SynthesisOutOfMemoryError, match=r"ran out of memory after 0 .*can't allocate memory") as error:
        synthesize(vit, images, SynthesisConfig(mode=mode))
    assert error.value.noise is None


def test_out_of_memory_while_a_bank_is_judged_keeps_it(
    vit: NormalizedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SynthesisConfig(limit=0.25, steps=2, stop="never")
    whole = synthesize(vit, images, config)
    monkeypatch.setattr(synthesis, "judge", Mock(side_effect=MemoryError))
    with pytest.raises(SynthesisOutOfMemoryError, match="after 2 steps") as error:
        synthesize(vit, images, config)
    assert error.value.noise is not None
    assert error.value.noise.tokens.equal(whole.tokens)
    assert error.value.noise.influence.isnan().all()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_limits_beyond_float32_are_refused(vit: NormalizedModel, images: Tensor, mode: str, site: str) -> None:
    with pytest.raises(ValueError, match=r"limit must be >= 0 and <= (3\.40282e\+38|1); got"):
        synthesize(vit, images, SynthesisConfig(mode=mode, site=site, limit=1e300))


DIVERGING = [
    {"mode": "universal", "lr": 1e30, "steps": 3},
    {"mode": "universal", "lr": 1e30, "steps": 1},  # finite itself, but nothing is seen through it
    {"mode": "universal", "lr": 1e300, "steps": 1},
    {"mode": "universal", "limit": 1e37},
    {"mode": "universal", "limit": 1e37, "stop": "batch", "on_unmet": "raise"},
    {"mode": "per_image", "lr": 1e30, "limit": 3.0},
    {"mode": "per_image", "limit": 1e37},
    {"mode": "boundary", "step_size": 1e30},
    {"mode": "boundary", "step_size": 1e300},
    {"mode": "boundary", "limit": 1e37},
]
NOT_FINITE = r"of \d noises, or the model's outputs under them, are not finite: lower config\.limit"


@pytest.mark.parametrize("settings", DIVERGING, ids=str)
def test_noise_that_is_not_finite_is_refused(vit: NormalizedModel, images: Tensor, settings: dict[str, Any]) -> None:
    with pytest.raises(NoiseNotFiniteError, match=NOT_FINITE):
        synthesize(FrozenEncoder(vit, backend="reference"), images, SynthesisConfig(**settings))


@pytest.mark.parametrize("settings", DIVERGING, ids=str)
def test_a_fast_backend_refuses_it_or_has_finite_noise_and_says_that_it_is_unmet(
    vit: NormalizedModel, images: Tensor, settings: dict[str, Any]
) -> None:
    """Its layer norm takes values whose squares overflow."""
    try:
        noise = synthesize(vit, images, SynthesisConfig(**{**settings, "on_unmet": "keep"}))
    except NoiseNotFiniteError:
        return
    assert noise.tokens.isfinite().all()
    assert noise.norm.isfinite().all()
    assert noise.influence.isfinite().all()
    assert settings["mode"] == "boundary" or not noise.converged.all()  # one may by chance


def test_noise_without_a_scale_is_zero_and_no_error(vit: NormalizedModel, images: Tensor) -> None:
    """With on_unmet="scale" nothing may be left of a noise: that is an answer, and its influence is not known."""
    noise = synthesize(vit, images, SynthesisConfig(limit=1e10, steps=1, on_unmet="scale", eps=1e-12))
    assert noise.tokens.isfinite().all()


def test_interrupt_carries_the_noise_so_far(vit: NormalizedModel, images: Tensor) -> None:
    calls = itertools.count(1)

    def interrupt(*_: object) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt

    vit.network.head.register_forward_hook(interrupt)
    with pytest.raises(SynthesisInterrupted) as caught:
        synthesize(vit, images, SynthesisConfig(limit=1.0, steps=50, eps=1e-9))
    assert 0 < caught.value.noise.steps.item() < 50
    assert caught.value.noise.influence.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "univrsal"}, "mode must be one of .* Did you mean 'universal'"),
        ({"site": "cls"}, "site must be one of 'patch', 'block0', 'pixels'; got 'cls'"),
        ({"eps": 0}, "eps must be > 0 and <= 2; got 0"),
        ({"eps": float("nan")}, "eps must be"),
        ({"limit": -1}, "limit must be >= 0; got -1"),
        ({"steps": 0}, "steps must be >= 1; got 0"),
        ({"count": 0}, "count must be >= 1"),
        ({"radius": 0}, "radius must be > 0; got 0"),
        ({"warm": 1.5}, "warm must be >= 0 and <= 1; got 1.5"),
        ({"solver": "adam"}, "solver must be one of .* Did you mean 'adamw'"),
        ({"image_fraction": 1.5}, "image_fraction must be > 0 and <= 1; got 1.5"),
        ({"on_unmet": "drop"}, "on_unmet must be one of"),
        ({"limit_range": 1.5}, "limit_range must be"),
        ({"step_range": -0.5}, "step_range must be"),
        ({"objective": "prediction", "mode": "universal"}, "for mode 'boundary'; got mode='universal'"),
        ({"smooth_limit": -0.1, "site": "pixels"}, "smooth_limit must be"),
        ({"contrast": -0.1}, "contrast must be >= 0; got -0.1"),
        ({"limit": 3.0, "site": "pixels"}, "limit must be >= 0 and <= 1; got 3.0"),
        ({"smooth_limit": 0.1, "site": "patch"}, "smooth_limit is for site 'pixels'; got site='patch'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthesisConfig(**change)


def test_bad_images_are_named(vit: NormalizedModel, images: Tensor) -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (images * 2, ValueError, r"pixels in \[0, 1\]; got the range"),
        (images[:, :1], ValueError, "must have 3 channels; got 1"),
        (images[..., :8], ValueError, "must be 16x16 pixels; got 16x8"),
        ((images * 255).byte(), TypeError, "floating dtype"),
        (images.index_fill(0, torch.tensor([0]), float("nan")), ValueError, "768 NaN"),
        (images[:0], ValueError, "empty"),
        ([], ValueError, "empty"),
        (iter([images]), ValueError, "iterator"),
        (["picture"], TypeError, "must be a tensor"),
    ]
    for batches, error, message in cases:
        with pytest.raises(error, match=message):
            synthesize(vit, batches)
    with pytest.raises(ValueError, match="empty"):
        synthesize(vit, [], SynthesisConfig(mode="boundary"))


def test_nan_weights_are_found(vit: NormalizedModel, images: Tensor) -> None:
    with torch.no_grad():
        vit.network.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits of the clean images must be finite"):
        synthesize(vit, images)


def test_site_of_encoder_and_config_must_agree(vit: NormalizedModel, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"config.site is 'patch' but the encoder was made for site 'pixels'"):
        synthesize(FrozenEncoder(vit, site="pixels"), images)


def test_bank_lowers_influence_below_its_permuted_control(make_vit: Callable[..., NormalizedModel]) -> None:
    vit = make_vit(depth=3)
    data = torch.rand(24, 3, 16, 16)
    noise = synthesize(vit, data, SynthesisConfig(limit=1.0, steps=150, stop="never"))
    learned, permuted = (measure_influence(vit, n, data[-8:]).item() for n in (noise, noise.permuted()))
    assert learned < 0.5 * permuted


def test_model_without_adapter_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="no adapter splits Sequential"):
        synthesize(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), images)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got function"):
        synthesize(F.relu, images)  # type: ignore[arg-type]
