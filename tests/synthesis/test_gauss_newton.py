"""Gauss-Newton on universal noise: a dense solve and autograd as oracles, and what the step promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnull.encoder import FrozenEncoder
from fastnull.models import create_model
from fastnull.synthesis import SynthesisConfig, gauss_newton, synthesize
from fastnull.synthesis.gauss_newton import DAMPING, gauss_newton_step
from fastnull.synthesis.objective import influence, probability_change
from fastnull.synthesis.solvers import shared_rows
from fastnull.vit import SITES, NormalizedModel


def dense_step(v: Tensor, f: Tensor, G: Tensor, radius: float) -> Tensor:
    """The step of one noise [P] by a factorisation; f [B], G [B, P]."""
    B = len(f)
    damping = DAMPING * G.square().sum(1).mean() * torch.eye(B, dtype=G.dtype)
    d = -G.T @ torch.linalg.solve(G @ G.T / B + damping, f) / B
    return d * min(1.0, float(radius * v.norm() / d.norm()))


def problem(M: int = 2, B: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [M, 5, 8], changes [M, B] and rows [M, B, 5, 8], in float64."""
    return tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((M, 5, 8), (M, B), (M, B, 5, 8)))  # type: ignore[return-value]


def one_of_one(value: Tensor) -> Tensor:
    """The mean over one process: what it is given takes the way of several."""
    return value


Mean = Callable[[Tensor], Tensor] | None


@pytest.fixture(params=["one process", "one process on a GPU", "several processes"])
def mean(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mean:
    """The argument that makes the step take one of its ways."""
    if request.param == "one process on a GPU":
        monkeypatch.setattr(gauss_newton, "_by_cholesky", gauss_newton._by_conjugate_gradients)
    return one_of_one if request.param == "several processes" else None


@pytest.mark.parametrize("radius", [100.0, 0.01])
def test_step_is_the_dense_solve(radius: float, mean: Mean) -> None:
    noise, changes, rows = problem()
    step = gauss_newton_step(noise, changes, rows, radius, mean=mean)
    for m in range(2):
        expected = dense_step(noise[m].flatten(), changes[m], rows[m].flatten(1), radius)
        torch.testing.assert_close(step[m].flatten(), expected, rtol=1e-10, atol=1e-12)
    if radius < 1:
        torch.testing.assert_close(step.flatten(1).norm(dim=1), radius * noise.flatten(1).norm(dim=1))


def test_a_push_is_solved_for_with_the_changes(mean: Mean) -> None:
    noise, changes, rows = problem()
    push = torch.randn_like(noise)
    step = gauss_newton_step(noise, changes, rows, 1e9, push, mean).flatten(1)
    G = rows.flatten(2)
    for m in range(2):
        damping = DAMPING * G[m].square().sum(1).mean() * torch.eye(40, dtype=torch.float64)
        system = G[m].T @ G[m] / 6 + damping
        expected = torch.linalg.solve(system, push[m].flatten() - G[m].T @ changes[m] / 6)
        torch.testing.assert_close(step[m], expected, rtol=1e-9, atol=1e-10)


def test_push_moves_along_itself_where_no_image_objects(mean: Mean) -> None:
    noise, changes, rows = problem()
    rows[:, :, 0] = 0  # the first token is seen by no image
    push = torch.zeros_like(noise)
    push[:, 0] = noise[:, 0]
    plain, pushed = (gauss_newton_step(noise, changes, rows, 1e9, p, mean) for p in (0.0, push))
    trace = rows.flatten(2).square().sum(2).mean(1)
    torch.testing.assert_close(pushed - plain, push / (DAMPING * trace)[:, None, None])


def test_nothing_to_solve_is_no_step(mean: Mean) -> None:
    noise, changes, rows = problem()
    assert not gauss_newton_step(noise, changes, rows * 0, 0.1, mean=mean).any()
    assert not gauss_newton_step(noise, changes * 0, rows, 0.1, mean=mean).any()


def test_a_broken_noise_is_seen_and_leaves_the_others(mean: Mean) -> None:
    noise, changes, rows = problem()
    expected = gauss_newton_step(noise, changes, rows, 9.0, mean=mean)[0]
    rows[1, 2, 3] = torch.nan
    step = gauss_newton_step(noise, changes, rows, 9.0, mean=mean)
    torch.testing.assert_close(step[0], expected)
    assert step[1].isnan().any()


@pytest.mark.parametrize("B", [16, 64, 256])
@pytest.mark.parametrize("spectrum", ["even", "steep"])
def test_every_way_is_the_direct_solve_of_float64(B: int, spectrum: str, mean: Mean) -> None:
    """At the size of a real step, whose system has a condition number of 200, in float32."""
    scales = torch.linspace(0.1, 3, B) if spectrum == "even" else torch.arange(1, B + 1) ** -1.0
    noise, changes, rows = torch.randn(1, 8, 64), torch.rand(1, B), torch.randn(1, B, 8, 64) * scales.view(B, 1, 1)
    expected = dense_step(noise[0].double().flatten(), changes[0].double(), rows[0].double().flatten(1), 1e9)
    step = gauss_newton_step(noise, changes, rows, 1e9, mean=mean).flatten().double()
    assert (step - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("push", [0.0, torch.ones(1, 5, 8, dtype=torch.float64)], ids=["no push", "push"])
def test_passes_over_the_rows(push: Tensor | float, mean: Mean) -> None:
    """What the module's docstring says, by the operations that read all rows."""
    _, changes, rows = problem(M=1)
    passes: list[Any] = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            reads = any(isinstance(value, Tensor) and value.numel() == rows.numel() for value in args)
            if reads and not func.is_view:
                passes.append(func)
            return result

    with Counts():
        gauss_newton_step(torch.ones(1, 5, 8, dtype=torch.float64), changes, rows, 1.0, push, mean)
    assert len(passes) == (50 if mean is one_of_one else 2 + isinstance(push, Tensor))


def test_the_order_of_images_does_not_matter(mean: Mean) -> None:
    noise, changes, rows = problem(M=1, B=16)
    order = torch.randperm(16)
    step = gauss_newton_step(noise, changes, rows, 9.0, mean=mean)
    other = gauss_newton_step(noise, changes[:, order], rows[:, order], 9.0, mean=mean)
    torch.testing.assert_close(step, other, rtol=1e-8, atol=1e-10)


def test_probability_change_is_the_root_of_the_influence_and_its_gradient() -> None:
    clean, noisy = torch.randn(2, 7, 10, dtype=torch.float64)
    leaf = noisy.requires_grad_(True)
    distance = (leaf.softmax(1) - clean.softmax(1)).norm(dim=1)
    change, direction = probability_change(clean, noisy.detach())
    torch.testing.assert_close(change, distance.detach())
    torch.testing.assert_close(change.square(), influence(clean, noisy.detach()))
    torch.testing.assert_close(direction, torch.autograd.grad(distance.sum(), leaf)[0])
    same, nothing = probability_change(clean, clean)
    assert not same.any()
    assert not nothing.any()


@pytest.mark.parametrize("site", SITES)
def test_rows_are_those_of_autograd(vit: NormalizedModel, images: Tensor, site: str) -> None:
    encoder = FrozenEncoder(vit.double(), backend="reference", site=site)
    tokens = encoder.embed(images.double())
    clean = encoder(tokens)
    noise = 0.3 * torch.randn(2, *tokens.shape[1:], dtype=torch.float64)
    changes, rows = shared_rows(encoder, tokens, clean, noise)
    for m, b in ((0, 0), (1, 5)):
        leaf = noise[m].clone().requires_grad_(True)
        noisy = tokens[b] + leaf
        noisy = noisy.clamp(0, 1) if site == "pixels" else noisy
        change = (encoder.vit.logits(noisy[None], site).softmax(1) - clean[b].softmax(0)).norm()
        torch.testing.assert_close(changes[m, b], change.detach())
        (gradient,) = torch.autograd.grad(change, leaf)
        torch.testing.assert_close(rows[m, b], gradient, rtol=1e-8, atol=1e-12)


def test_default_is_a_plain_loop_of_dense_steps(vit: NormalizedModel) -> None:
    vit = vit.double()
    loader = [torch.rand(4, 3, 16, 16, dtype=torch.float64) for _ in range(3)]
    settings: dict[str, Any] = {"limit": 1.0, "schedule": "constant", "stop": "never"}
    start = synthesize(vit, loader, SynthesisConfig(steps=1, radius=1e-30, **settings)).tokens
    ours = synthesize(vit, loader, SynthesisConfig(steps=7, **settings))
    network, v = vit.network, start[0].clone()
    for step in range(7):
        patches = network.patch_embed((loader[step % 3] - 0.5) / 0.5)

        def probabilities(x: Tensor) -> Tensor:
            return network.forward_head(network.norm(network.blocks(network._pos_embed(x)))).softmax(-1)  # type: ignore[no-any-return]

        leaf = v.clone().requires_grad_(True)
        f = (probabilities(patches + leaf) - probabilities(patches).detach()).norm(dim=1)
        G = torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0].flatten() for value in f])
        v += dense_step(v.flatten(), f.detach(), G, radius=0.1).view_as(v)
    assert (v - start[0]).abs().max() > 0.1
    torch.testing.assert_close(ours.tokens[0], v, rtol=0, atol=1e-8)
    assert ours.steps.tolist() == [7]


def test_it_needs_a_third_of_the_updates_of_adamw() -> None:
    """Where noise does little, as on a trained model; on a wildly random one neither is faster."""
    model = create_model("vit_digits", num_classes=10)
    with torch.no_grad():
        for block in model.network.blocks:
            block.mlp.fc1.weight.mul_(4)
    batches = list(torch.rand(8, 16, 3, 16, 16))
    limits: dict[str, Any] = {"limit": 1.0, "contrast": 0.0, "eps": 1e-5, "steps": 400}
    ours = synthesize(model, batches, SynthesisConfig(**limits))
    theirs = synthesize(model, batches, SynthesisConfig(solver="adamw", **limits))
    assert ours.converged.item()
    assert theirs.converged.item()
    assert 0 < 3 * ours.steps.item() <= theirs.steps.item()


def test_solver_follows_from_the_settings() -> None:
    assert SynthesisConfig().rule == "gauss_newton"
    for asked in ({"lr": 0.1}, {"weight_decay": 0.01}, {"objective": "l2_squared"}, {"solver": "adamw"}):
        assert SynthesisConfig(**asked).rule == "adamw"
    assert SynthesisConfig.published().rule == "adamw"
    assert SynthesisConfig(mode="per_image").rule == "adamw"
    assert SynthesisConfig(solver="adamw").rate == 0.1
    assert SynthesisConfig(radius=0.2).rate == 0.2
    for wrong in ({"lr": 0.1}, {"weight_decay": 0.01}, {"objective": "l2_squared"}):
        with pytest.raises(ValueError, match="settings of solver 'adamw'; 'gauss_newton' has radius"):
            SynthesisConfig(solver="gauss_newton", **wrong)
