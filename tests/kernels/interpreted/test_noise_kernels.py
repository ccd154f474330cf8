"""Objective and step kernels against float64 and torch's optimiser."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops
from fastnull.ops.noise_objective import KINDS
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, randn
from tests.ops import checks
from tests.ops.test_noise_step import STEPS, laid_out, take

# K: 1000 = ImageNet, padded to 1024; 10 = padded to 16; 1 = degenerate (softmax constant).
LOGITS = [(3, 1000), (5, 10), (2, 1)]
# [M, N, D]: 5 * 96 = less than a chunk of 1024; 13 * 100 = a chunk and a tail, a noise that begins inside no chunk.
NOISES = [(3, 5, 96), (2, 13, 100)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOGITS)
def test_objective(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    checks.noise_objective(3 * randn(shape, torch.float32, 0), 3 * randn(shape, dtype, 1), kind)


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


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("shape", NOISES)
def test_adamw_is_torchs(shape: tuple[int, ...], weight_decay: float) -> None:
    checks.adamw(*noise_and_grads(shape, 4), weight_decay)


def test_late_steps() -> None:
    """Step 1,000,000: the correction is 1, and beta ** t neither overflows nor becomes NaN."""
    noise, (grad,) = noise_and_grads((1, 3, 20), 1, seed=10)
    state = ops.AdamWState.zeros(noise)
    state.steps.fill_(999_999)
    expected = noise.double() - 0.1 * (0.1 * grad.double()) / (grad.double().abs() * 0.01**0.5 + 1e-8)
    ops.adamw_step(noise, grad, state, lr=0.1, betas=(0.9, 0.99))
    torch.testing.assert_close(noise.double(), expected, rtol=1e-6, atol=1e-6)


def test_gate_freezes_bit_for_bit_and_turns_around() -> None:
    checks.adamw_gates(*noise_and_grads((3, 7, 9), 3, seed=20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NOISES)
def test_direct_steps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise, (grad,) = noise_and_grads(shape, 1, seed=30)
    checks.direct_steps(noise, grad.to(dtype))


@pytest.mark.parametrize("size", checks.SIZES)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_normalised_step_has_its_length_for_gradients_of_any_size(size: float) -> None:
    grad, expected = checks.gradient_of_size(size, 1300)  # more than a chunk
    noise = torch.zeros(2, 1300, device=DEVICE)
    ops.normalized_step(noise, grad.to(DEVICE), lr=0.5)
    checks.normalized_step_of_length(noise, expected)


@pytest.mark.parametrize("layout", ["channels_last", "reversed"])
@pytest.mark.parametrize("step", STEPS)
def test_any_memory_format_gives_the_same_bits(step: str, layout: str) -> None:
    start, (grad,) = noise_and_grads((3, 3, 4, 5), 1, seed=50)
    results = []
    for form in ("dense", layout):
        noise = laid_out(start, form)
        strides = noise.stride()
        take(step, noise, laid_out(grad, form), ops.AdamWState.zeros(start))
        assert noise.stride() == strides
        results.append(noise)
    assert results[1].equal(results[0])
    assert not results[0].equal(start)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_properties_of_direct_steps() -> None:
    noise, (grad,) = noise_and_grads((3, 13, 100), 1, seed=40)
    checks.properties_of_direct_steps(noise, grad)
    checks.steps_of_nothing(noise[:0])
