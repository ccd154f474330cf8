"""The universal loop: many noises at once, growing batches, scaling to ε, and the same loop in a graph."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from fastnull.augment import NullspaceAugment
from fastnull.encoder import FrozenEncoder
from fastnull.synthesis import (
    SOLVERS,
    SynthesisConfig,
    SynthesisOutOfMemoryError,
    batches,
    gauss_newton,
    measure_influence,
    replay,
    synthesize,
    universal,
    warm_start,
)
from fastnull.synthesis import run as synthesis
from fastnull.synthesis.config import MODES
from fastnull.synthesis.objective import influence
from fastnull.synthesis.solvers import own_noise, shared_gradient
from fastnull.vit import SITES, NormalizedModel
from tests.synthesis.recorded_graphs import NothingWaits, pretend_graphs


@pytest.fixture
def loader(vit: NormalizedModel) -> list[Tensor]:
    for block in vit.network.blocks:  # random weights barely see the noise: make them louder
        block.mlp.fc1.weight.data.mul_(4)
    return [torch.rand(8, 3, 16, 16) for _ in range(4)]


@pytest.mark.parametrize("site", SITES)
def test_noises_in_one_pass_are_noises_one_by_one(vit: NormalizedModel, images: Tensor, site: str) -> None:
    encoder = FrozenEncoder(vit.double(), backend="reference", site=site)
    tokens = encoder.embed(images.double())
    clean = encoder(tokens)
    noise = 0.3 * torch.randn(3, *tokens.shape[1:], dtype=torch.float64)
    together = shared_gradient(encoder, tokens, clean, noise, "l2")
    for m in range(3):
        alone = shared_gradient(encoder, tokens, clean, noise[m : m + 1], "l2")
        torch.testing.assert_close(tuple(part[m : m + 1] for part in together), alone, rtol=1e-10, atol=1e-12)


def test_a_bank_that_is_cut_into_passes(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SynthesisConfig(count=5, steps=4, stop="never", limit=1.0)
    whole = synthesize(vit, loader, config)
    monkeypatch.setattr(universal, "MOST_IMAGES", 16)  # two noises a pass
    cut = synthesize(vit, loader, config)
    torch.testing.assert_close(cut.tokens, whole.tokens, rtol=1e-3, atol=1e-4)


def test_growing_batches_use_few_images_first(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spied(encoder: FrozenEncoder, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(len(tokens))
        return shared_gradient(encoder, tokens, *rest)

    monkeypatch.setattr(universal, "shared_gradient", spied)
    start = SynthesisConfig(steps=1, limit=1.0, lr=1e-30, stop="never")
    eps = 0.5 * synthesize(vit, loader, start).influence.item()
    sizes.clear()
    noise = synthesize(vit, loader, SynthesisConfig(steps=300, limit=1.0, lr=0.05, eps=eps, growing=True))
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert set(sizes) == {1, 2, 4, 8}
    assert noise.converged.all()  # judged on the check images, not on the small batches


def test_final_scale_meets_eps_from_both_sides(vit: NormalizedModel, loader: list[Tensor]) -> None:
    short = SynthesisConfig(steps=1, limit=1.0, lr=1e-30, stop="never", count=2)
    start = synthesize(vit, loader, short)
    for factor in (0.5, 2.0):  # too loud for ε, and too quiet
        eps = factor * start.influence.min().item()
        config = SynthesisConfig(steps=1, lr=1e-30, stop="never", count=2, eps=eps, final_scale=True)
        scaled = synthesize(vit, loader, config, start=start)
        assert scaled.converged.all()
        assert (scaled.influence > 0.98 * eps).all()
        assert ((scaled.norm < start.norm) if factor < 1 else (scaled.norm > start.norm)).any()
        torch.testing.assert_close(scaled.influence, measure_influence(vit, scaled, loader))


def in_a_graph(monkeypatch: pytest.MonkeyPatch, *, conditional: bool) -> list[str]:
    """Let synthesis run in the stand-in for graphs; returns what happens."""
    monkeypatch.setattr(universal, "use_graph", lambda *_: True)
    return pretend_graphs(monkeypatch, conditional=conditional)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("stop", ["never", "batch", "check"])
def test_a_graph_gives_the_same_noise(
    vit: NormalizedModel,
    loader: list[Tensor],
    stop: str,
    conditional: bool,
    solver: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, where no noise ends early: a graph looks at the device every eighth step only."""
    config = SynthesisConfig(count=3, steps=20, limit=1.0, stop=stop, eps=1e-9, solver=solver)
    eager = synthesize(vit, loader, config)
    events = in_a_graph(monkeypatch, conditional=conditional)
    replayed = synthesize(vit, loader, config)
    assert events == ["capture"] + ["replay"] * 20
    assert torch.equal(replayed.tokens, eager.tokens)
    assert replayed.history == eager.history
    assert torch.equal(replayed.steps, eager.steps)


def quiet(vit: NormalizedModel, loader: list[Tensor], steps: int) -> float:
    """An ε that two noises meet at different steps, well before so many."""
    free = synthesize(vit, loader, SynthesisConfig(count=2, steps=steps, limit=1.0, stop="never", lr=0.1))
    return min(record["influence"] for record in free.history[:8]) * 1.05


@pytest.mark.parametrize("conditional", [False, True])
def test_a_graph_ends_as_the_published_rule_does_and_looks_one_look_late(
    vit: NormalizedModel, loader: list[Tensor], conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit also where noises end: those that met ε wait for the host without moving. (So with AdamW, the
    published solver; Gauss-Newton's products round otherwise where fewer noises take part.)"""
    eps = quiet(vit, loader, 20)
    config = SynthesisConfig(count=2, steps=60, limit=1.0, contrast=0.0, stop="batch", eps=eps, solver="adamw")
    eager = synthesize(vit, loader, config)
    last = len(eager.history)
    assert 8 < last < 40
    events = in_a_graph(monkeypatch, conditional=conditional)
    replayed = synthesize(vit, loader, config)
    assert torch.equal(replayed.tokens, eager.tokens)
    assert torch.equal(replayed.steps, eager.steps)
    launched = events.count("replay")
    assert launched % universal.LOOK_EVERY == 0
    assert last + universal.LOOK_EVERY <= launched < last + 2 * universal.LOOK_EVERY
    assert events.count("left out") == (launched - last if conditional else 0)


def test_by_the_check_images_a_graph_ends_too(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = synthesize(vit, loader, SynthesisConfig(steps=1, limit=1.0, lr=1e-30, stop="never"))
    eps = 0.5 * start.influence.item()
    events = in_a_graph(monkeypatch, conditional=True)
    with pytest.warns(UserWarning, match="captured in one more graph"):
        noise = synthesize(vit, loader, SynthesisConfig(steps=300, limit=1.0, lr=0.05, eps=eps, growing=True))
    assert noise.converged.all()
    assert events.count("replay") < 300
    assert events.count("capture") > 1, "the batch has grown"


def test_in_a_graph_a_held_noise_stays_held(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published rule between two looks: a noise that met ε is not moved any more, the others are."""
    config = SynthesisConfig(count=2, steps=20, limit=1.0, stop="batch", eps=quiet(vit, loader, 20), solver="adamw")
    eager = synthesize(vit, loader, config)
    assert (eager.steps < 20).any()
    run = universal.UniversalRun.__init__

    def late(self: universal.UniversalRun, *rest: Any) -> None:
        run(self, *rest)
        self._look_every = 8

    monkeypatch.setattr(universal.UniversalRun, "__init__", late)
    seldom = synthesize(vit, loader, config)
    assert torch.equal(seldom.tokens, eager.tokens)
    assert torch.equal(seldom.steps, eager.steps)


class Made(TorchDispatchMode):
    """Knows the tensors that operations made and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self._made: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._made |= {id(value): value for value in tree_leaves(result) if isinstance(value, Tensor)}
        return result

    def values(self) -> int:
        """Number of values that they hold."""
        return sum(tensor.numel() for tensor in self._made.values())


@pytest.mark.parametrize("graph", [True, False])
def test_memory_is_fixed_after_the_first_step(
    vit: NormalizedModel, loader: list[Tensor], graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 steps of a graph hold what one holds; a step itself (replays here do nothing) is tried 50 times."""
    config, total = SynthesisConfig(count=2, limit=1.0, stop="never"), 10_000 if graph else 50
    if graph:
        in_a_graph(monkeypatch, conditional=False)
        monkeypatch.setattr(replay, "_capture", lambda function, inputs: (lambda: None, function(*inputs)))
    encoder = FrozenEncoder(vit)
    data = batches.Batches(encoder, loader, loader[:1], config)
    start = torch.rand(2, *data.shape)
    run, held = universal.UniversalRun(encoder, data, config, start), []
    with Made() as made:
        run.run(total, Mock(update=lambda: held.append(made.values())))
    assert len(held) == total
    settled = 2 * universal.LOOK_EVERY  # by then every batch has been kept, and the first look been taken
    assert set(held[settled:]) == {held[settled]}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_what_a_graph_holds_waits_for_nothing(
    vit: NormalizedModel, loader: list[Tensor], mode: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(universal, "use_graph", lambda *_: True)
    monkeypatch.setattr(gauss_newton, "_by_cholesky", gauss_newton._by_conjugate_gradients)  # as on a GPU
    config = SynthesisConfig(mode=mode, site=site, count=2, limit=0.5, steps=3, stop="batch", log_norm_weight=0.1)
    encoder = FrozenEncoder(vit, site=site)
    data = batches.Batches(encoder, loader, loader[:1], config)
    tokens, clean = data.check[0]
    start, lr = torch.rand(2 if mode == "universal" else len(tokens), *data.shape), torch.tensor(0.1).double()
    run = universal.UniversalRun(encoder, data, config, start)
    with NothingWaits():
        if mode == "universal":
            run._one_step(tokens, clean, lr)
            assert run._moving().any().shape == ()
        else:
            own_noise(encoder, tokens, clean, start, config)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingWaits():
        run._status()[0].item()  # the guard sees what it is there for


@pytest.mark.parametrize(("solver", "gradient"), [("gauss_newton", "shared_rows"), ("adamw", "shared_gradient")])
def test_out_of_memory_keeps_the_noise(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch, solver: str, gradient: str
) -> None:
    real = getattr(universal, gradient)
    calls = iter(range(100))

    def failing(*args: Any) -> tuple[Tensor, ...]:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("tried to allocate 1 PiB")
        return real(*args)

    monkeypatch.setattr(universal, gradient, failing)
    with pytest.raises(
        SynthesisOutOfMemoryError, match=r"after 3 steps: lower the images of a batch \(8\) or config.count.*1 PiB"
    ) as error:
        synthesize(vit, loader, SynthesisConfig(steps=10, stop="never", solver=solver))
    assert error.value.noise is not None
    assert error.value.noise.steps.tolist() == [3]
    assert error.value.noise.influence.isnan().all()
    assert not error.value.noise.converged.any()


def test_scaling_to_eps_takes_few_looks(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FrozenEncoder(vit)
    pairs = [batches.embed_batch(encoder, batch) for batch in loader]
    noise = torch.rand(3, 16, 32) - 0.5
    looks: list[int] = []
    real = universal.judge

    def counted(encoder: FrozenEncoder, noise: Tensor, *rest: Any) -> Tensor:
        looks.append(len(noise))
        return real(encoder, noise, *rest)

    monkeypatch.setattr(universal, "judge", counted)
    whole = real(encoder, noise, pairs)
    assert len(set(whole.tolist())) == 3
    for fraction in (0.01, 0.3, 0.9, 1.5):
        looks.clear()
        eps = fraction * float(whole.mean())
        scaled, seen = universal.scaled_to_eps(encoder, noise, whole, pairs, eps, larger=True)
        assert ((seen > 0.98 * eps) & (seen < eps)).all()
        torch.testing.assert_close(seen, real(encoder, scaled, pairs))
        torch.testing.assert_close(torch.cosine_similarity(scaled.flatten(1), noise.flatten(1)), torch.ones(3))
        assert len(looks) <= 7
        assert looks == sorted(looks, reverse=True), "a noise that is done was judged again"
    quiet, seen = universal.scaled_to_eps(encoder, noise, whole, pairs, 2 * float(whole.max()))
    assert torch.equal(quiet, noise)
    assert torch.equal(seen, whole)
    broken, seen = universal.scaled_to_eps(encoder, noise * float("nan"), whole * float("nan"), pairs, 0.1)
    assert not broken.nan_to_num().any()
    assert seen.isnan().all()


def test_noises_are_judged_together_as_one_by_one(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FrozenEncoder(vit)
    pairs = [batches.embed_batch(encoder, batch) for batch in (loader[0], loader[1][:3])]
    noise = 2 * torch.rand(3, 16, 32) - 1
    images = torch.cat([tokens for tokens, _ in pairs]), torch.cat([clean for _, clean in pairs])
    expected = [influence(images[1], encoder(images[0] + one)).mean() for one in noise]
    torch.testing.assert_close(universal.judge(encoder, noise, pairs), torch.stack(expected))
    monkeypatch.setattr(universal, "MOST_IMAGES", 16)  # two noises a pass
    torch.testing.assert_close(universal.judge(encoder, noise, pairs), torch.stack(expected))


def test_no_noise_is_judged_twice(vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last look at a noise saw is what it is handed out with, and what its search for ε begins with."""
    seen: list[Tensor] = []
    real = universal.judge

    def kept(encoder: FrozenEncoder, noise: Tensor, *rest: Any) -> Tensor:
        seen.extend(noise.clone())
        return real(encoder, noise, *rest)

    for module in (universal, synthesis):
        monkeypatch.setattr(module, "judge", kept)
    start = synthesize(vit, loader, SynthesisConfig(steps=1, limit=1.0, lr=1e-30, stop="never", count=2))
    assert len(seen) == 2
    seen.clear()
    config = SynthesisConfig(count=2, limit=1.0, lr=0.05, steps=300, eps=0.8 * start.influence.min().item())
    for scale in (False, True):
        noise = synthesize(vit, loader, replace(config, final_scale=scale))
        assert noise.converged.all()
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
        torch.testing.assert_close(noise.influence, measure_influence(vit, noise, loader[-1:]))
        seen.clear()


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_a_warm_start_mixes_directions(fraction: float) -> None:
    config = SynthesisConfig(warm=fraction, limit=1.0, seed=4)
    last = 0.01 * torch.randn(2, 16, 32)
    fresh = warm_start(replace(config, warm=0.0), last)
    start = warm_start(config, last)
    torch.testing.assert_close(start.flatten(1).norm(dim=1), fresh.flatten(1).norm(dim=1))
    old, new = (torch.cosine_similarity(start.flatten(1), other.flatten(1)) for other in (last, fresh))
    if fraction == 1:
        torch.testing.assert_close(old, torch.ones(2))
    else:  # as good as orthogonal
        torch.testing.assert_close(old / new, torch.full((2,), fraction / (1 - fraction)), rtol=0.3, atol=0.15)
    assert fresh.abs().max() <= 1.0


def test_refresh_starts_from_the_last_bank(vit: NormalizedModel, loader: list[Tensor]) -> None:
    settings: dict[str, Any] = {"limit": 1.0, "steps": 1, "radius": 1e-30, "stop": "never", "count": 2}
    cosines = []
    for warm in (0.0, 0.9):
        aug = NullspaceAugment(vit, "universal", config=SynthesisConfig(warm=warm, **settings))
        first = aug.refresh(loader)
        again = NullspaceAugment(vit, "universal", config=aug.config)
        aug.step = 1
        again.load_state_dict(aug.state_dict())
        second = aug.refresh(loader)
        resumed = again.refresh(loader)
        assert first is not None
        assert second is not None
        assert resumed is not None
        assert torch.equal(resumed.tokens, second.tokens)
        cosines.append(torch.cosine_similarity(first.tokens.flatten(1), second.tokens.flatten(1)))
    assert (cosines[0].abs() < 0.2).all()
    assert (cosines[1] > 0.9).all()


def test_what_a_loader_gave_can_be_kept(vit: NormalizedModel, loader: list[Tensor]) -> None:
    config = SynthesisConfig(limit=1.0, rounds=3, stop="never")
    anew, kept = Mock(side_effect=loader.__getitem__), Mock(side_effect=loader.__getitem__)
    sources = (DataLoader(range(4), batch_size=None, collate_fn=read) for read in (anew, kept))
    first = synthesize(vit, next(sources), config, check=loader[0])
    second = synthesize(vit, next(sources), replace(config, keep=True), check=loader[0])
    assert (anew.call_count, kept.call_count) == (3 * 4, 4)
    assert torch.equal(first.tokens, second.tokens)


def test_tokens_that_do_not_fit_are_made_anew(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SynthesisConfig(steps=6, stop="never")
    kept = synthesize(vit, loader, config)
    embedded: list[int] = []
    real = batches.embed_batch

    def counted(*args: Any) -> batches.Pair:
        embedded.append(1)
        return real(*args)

    monkeypatch.setattr(batches, "embed_batch", counted)
    monkeypatch.setattr(batches.Batches, "_fit", lambda self, pair: False)
    anew = synthesize(vit, loader, config)
    assert torch.equal(anew.tokens, kept.tokens)
    assert len(embedded) == 4 + 6  # the round that is judged on, and six steps


def test_too_little_memory_is_said_beforehand(
    vit: NormalizedModel, loader: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches.Batches(FrozenEncoder(vit), loader, loader[0], SynthesisConfig())
    pair = torch.empty(8, 16, 32, device="meta"), torch.empty(8, 10, device="meta")
    monkeypatch.setattr(batches.torch.cuda, "mem_get_info", lambda device: (100_000, 10**9))

    cuda = torch.device("cuda", 0)
    given: Any = [SimpleNamespace(device=cuda, numel=x.numel, element_size=x.element_size) for x in pair]
    with pytest.warns(UserWarning, match=r"4 batches take 0.0 GB.*smaller image_fraction or a 16-bit encoder"):
        assert not data._fit(given)
    monkeypatch.setattr(batches.torch.cuda, "mem_get_info", lambda device: (200_000, 10**9))
    assert data._fit(given)


def test_a_graph_on_the_cpu_is_refused(vit: NormalizedModel, loader: list[Tensor]) -> None:
    for mode in MODES:
        with pytest.raises(ValueError, match="graph=True needs"):
            synthesize(vit, loader, SynthesisConfig(mode=mode, graph=True))
