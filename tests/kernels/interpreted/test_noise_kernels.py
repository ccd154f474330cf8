"""Objective and step kernels against float64 and torch's optimiser."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from fastnull.ops.noise_objective import KINDS
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, randn

# K: 1000 = ImageNet, padded to 1024; 10 = padded to 16; 1 = degenerate (softmax constant).
LOGITS = [(3, 1000), (5, 10), (2, 1)]
# [M, N, D]: 5 * 96 = less than a chunk of 1024; 13 * 100 = a chunk and a tail, a noise that begins inside no chunk.
NOISES = [(3, 5, 96), (2, 13, 100)]


def by_autograd(clean: torch.Tensor, noisy: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, gradient of its mean, and influence by plain torch operations and autograd."""
    leaf = noisy.clone().requires_grad_()
    norm = torch.linalg.vector_norm(leaf - clean, dim=1)
    loss = norm if kind == "l2" else norm.square()
    (cotangent,) = torch.autograd.grad(loss.mean(), leaf)
    return loss.detach(), cotangent, (clean.softmax(1) - noisy.softmax(1)).square().sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOGITS)
def test_objective(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    clean, noisy = 3 * randn(shape, torch.float32, 0), 3 * randn(shape, dtype, 1)
    with testing.poisoned():
        result = ops.noise_objective(clean, noisy, kind)
    # The arithmetic is float32 whatever the storage: reference and budget start from the stored values.
    references = by_autograd(clean.double(), noisy.double(), kind)
    baselines = by_autograd(clean, noisy.float(), kind)
    for name, actual, reference, baseline in zip(
        ("loss", "cotangent", "influence"), result[:3], references, baselines, strict=True
    ):
        testing.assert_within_budget(actual, reference, baseline, name)
    testing.assert_gradient_close(result.cotangent, references[1], baselines[1], "cotangent")


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("kind", KINDS)
def test_objective_edges(kind: str) -> None:
    """Groups share clean rows; no noise gives zeros; large logits do not overflow; NaN stays in its image."""
    clean, noisy = randn((2, 19), torch.float32, 2), randn((6, 19), torch.float32, 3)
    together = ops.noise_objective(clean, noisy, kind, groups=3)
    alone = ops.noise_objective(clean, noisy[2:4], kind)
    assert together.cotangent[2:4].equal(alone.cotangent)
    assert together.influence[2:4].equal(alone.influence)
    for value in ops.noise_objective(clean, clean.clone(), kind):
        assert value.equal(torch.zeros_like(value))
    far = torch.eye(2, 33, device=DEVICE)[:1] * 1000
    torch.testing.assert_close(ops.noise_objective(far, far.flip(1), kind).influence, torch.full_like(far[:, 0], 2.0))
    noisy[2, 18] = float("nan")
    spoilt = ops.noise_objective(clean, noisy, kind)
    expected = torch.arange(6, device=DEVICE) == 2
    assert spoilt.loss.isnan().equal(expected)
    assert spoilt.influence.isnan().equal(expected)
    assert spoilt.cotangent.isnan().any(1).equal(expected)
    assert ops.noise_objective(clean[:0], clean[:0], kind).loss.shape == (0,)


def noise_and_grads(shape: tuple[int, ...], steps: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tensors = [randn(shape, torch.float32, seed + i).contiguous() for i in range(steps + 1)]
    return tensors[0], tensors[1:]


def torch_adamw(noise: torch.Tensor, grads: list[torch.Tensor], **options: float) -> torch.Tensor:
    parameter = torch.nn.Parameter(noise.clone())
    optimiser = torch.optim.AdamW([parameter], betas=(0.9, 0.99), foreach=False, **options)
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("shape", NOISES)
def test_adamw_is_torchs(shape: tuple[int, ...], weight_decay: float) -> None:
    noise, grads = noise_and_grads(shape, 4)
    reference = torch_adamw(noise.double(), grads, lr=0.1, weight_decay=weight_decay)
    baseline = torch_adamw(noise, grads, lr=0.1, weight_decay=weight_decay)
    state = ops.AdamWState.zeros(noise)
    for grad in grads:
        ops.adamw_step(noise, grad, state, lr=0.1, betas=(0.9, 0.99), weight_decay=weight_decay)
    testing.assert_within_budget(noise, reference, baseline)
    assert state.steps.tolist() == [4] * shape[0]


def test_late_steps() -> None:
    """Step 1,000,000: the correction is 1, and beta ** t neither overflows nor becomes NaN."""
    noise, (grad,) = noise_and_grads((1, 3, 20), 1, seed=10)
    state = ops.AdamWState.zeros(noise)
    state.steps.fill_(999_999)
    expected = noise.double() - 0.1 * (0.1 * grad.double()) / (grad.double().abs() * 0.01**0.5 + 1e-8)
    ops.adamw_step(noise, grad, state, lr=0.1, betas=(0.9, 0.99))
    torch.testing.assert_close(noise.double(), expected, rtol=1e-6, atol=1e-6)


def test_gate_freezes_bit_for_bit_and_turns_around() -> None:
    """Gate 0 touches nothing, its state included; a noise that pauses goes on as if it had not; -1 is -grad."""
    start, grads = noise_and_grads((3, 7, 9), 3, seed=20)
    noise, state = start.clone(), ops.AdamWState.zeros(start)
    gates = [torch.tensor(g, device=DEVICE) for g in ([1.0, 0.0, -1.0], [0.0, 0.0, -1.0], [1.0, 0.0, -1.0])]
    for grad, gate in zip(grads, gates, strict=True):
        ops.adamw_step(noise, grad, state, gate, lr=0.1, betas=(0.9, 0.99))
    assert noise[1].equal(start[1])
    assert not state.exp_avg[1].any()
    assert not state.exp_avg_sq[1].any()
    assert state.steps.tolist() == [2, 0, 3]
    torch.testing.assert_close(noise[0], torch_adamw(start[0], [grads[0][0], grads[2][0]], lr=0.1, weight_decay=0.0))
    torch.testing.assert_close(noise[2], torch_adamw(start[2], [-g[2] for g in grads], lr=0.1, weight_decay=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NOISES)
def test_direct_steps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise, (grad,) = noise_and_grads(shape, 1, seed=30)
    grad = grad.to(dtype)
    grad[0, 0] = 0
    gate = torch.tensor([-1.0, 1.0, 0.0], device=DEVICE)[: shape[0]]
    rates = torch.tensor([0.5, 0.25, 0.5], device=DEVICE)[: shape[0]]
    column = (gate * rates).view(-1, 1, 1)
    norms = torch.linalg.vector_norm(grad.double().flatten(1), dim=1).view(-1, 1, 1)
    expected = {
        "normalized": noise.double() - column * grad.double() / norms,
        "sign": noise.double() - column * grad.double().sign(),
    }
    for kind, step in (("normalized", ops.normalized_step), ("sign", ops.sign_step)):
        moved = noise.clone()
        with testing.poisoned():
            step(moved, grad, gate, lr=rates)
        testing.assert_within_budget(moved, expected[kind], expected[kind].float(), kind)
        if shape[0] > 2:
            assert moved[2].equal(noise[2])


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-23, 1.0, 1e19, 3e38])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_normalised_step_has_its_length_for_gradients_of_any_size(size: float) -> None:
    direction = torch.linspace(-1, 1, 1300, dtype=torch.float64)  # more than a chunk
    grad = (torch.stack([direction, torch.zeros(1300)]) * size).float()
    noise = torch.zeros(2, 1300, device=DEVICE)
    ops.normalized_step(noise, grad.to(DEVICE), lr=0.5)
    expected = -0.5 * grad[0].double() / grad[0].double().norm()
    torch.testing.assert_close(noise[0].cpu().double(), expected, rtol=1e-6, atol=1e-9)
    assert not noise[1].any()


@pytest.mark.parametrize("layout", ["channels_last", "reversed"])
@pytest.mark.parametrize("step", ["adamw", "normalized", "sign"])
def test_any_memory_format_gives_the_same_bits(step: str, layout: str) -> None:
    start, (grad,) = noise_and_grads((3, 3, 4, 5), 1, seed=50)
    results = []
    for laid_out in (False, True):
        noise, g, state = start.clone(), grad.clone(), ops.AdamWState.zeros(start)
        if laid_out and layout == "channels_last":
            noise, g = (x.contiguous(memory_format=torch.channels_last) for x in (noise, g))
        elif laid_out:
            noise, g = (x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (noise, g))
        strides = noise.stride()
        if step == "adamw":
            ops.adamw_step(noise, g, state, lr=0.1)
        else:
            (ops.normalized_step if step == "normalized" else ops.sign_step)(noise, g, lr=0.1)
        assert noise.stride() == strides
        results.append(noise)
    assert results[1].equal(results[0])
    assert not results[0].equal(start)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_properties_of_direct_steps() -> None:
    """A normalised step has length lr; a zero gradient moves nothing; NaN goes through; no noise, no launch."""
    noise, (grad,) = noise_and_grads((3, 13, 100), 1, seed=40)
    grad[1] = 0
    moved, signed = noise.clone(), noise.clone()
    ops.normalized_step(moved, grad, lr=0.25)
    ops.sign_step(signed, grad, lr=0.25)
    lengths = (moved - noise).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths.cpu(), torch.tensor([0.25, 0.0, 0.25]), rtol=0, atol=1e-6)
    assert signed[1].equal(noise[1])
    grad[2, 12, 99] = float("nan")
    for step in (ops.normalized_step, ops.sign_step):
        spoilt = noise.clone()
        step(spoilt, grad, lr=0.25)
        assert spoilt[2, 12, 99].isnan()
        assert spoilt[:2].isfinite().all()
        step(noise[:0], grad[:0], lr=0.1)
    ops.adamw_step(noise[:0], grad[:0], ops.AdamWState.zeros(noise[:0]), lr=0.1)
