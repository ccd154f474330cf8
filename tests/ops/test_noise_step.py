"""Steps of many noises at once, every CPU backend against torch's optimiser and float64."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from tests.ops import checks
from tests.ops.checks import torch_adamw

# Noise shapes: [M, N, D] of tokens; a width that is no multiple of a vector, and is larger than one thread's part
# (32768 elements), so that ranges begin inside a noise; a width under one vector.
SHAPES = [(3, 5, 96), (2, 3, 112, 111), (4, 3)]


def noise_and_grads(shape: tuple[int, ...], steps: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_adamw_is_torchs(backend: str, shape: tuple[int, ...], weight_decay: float) -> None:
    noise, grads = noise_and_grads(shape, 4)
    baseline = torch_adamw(noise, grads, weight_decay)
    checks.adamw(noise, grads, weight_decay)
    # Four steps of float32 in the same order: within two units in the last place of torch's own result.
    torch.testing.assert_close(noise, baseline, rtol=2.4e-7, atol=1.2e-7)


def test_gate_freezes_bit_for_bit_and_turns_around(backend: str) -> None:
    checks.adamw_gates(*noise_and_grads((3, 7, 9), 3, seed=1))


def test_bfloat16_gradient_and_a_rate_for_each_noise(backend: str) -> None:
    noise, (grad,) = noise_and_grads((2, 5, 20), 1, seed=2)
    grad, rates = grad.to(torch.bfloat16), torch.tensor([0.1, 0.02])
    expected = torch.stack([torch_adamw(noise[m], [grad[m]], lr=rates[m].item()) for m in range(2)])
    ops.adamw_step(noise, grad, ops.AdamWState.zeros(noise), lr=rates, betas=(0.9, 0.99))
    torch.testing.assert_close(noise, expected, rtol=2.4e-7, atol=1.2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_direct_steps(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise, (grad,) = noise_and_grads(shape, 1, seed=3)
    checks.direct_steps(noise, grad.to(dtype))


def test_properties_of_direct_steps(backend: str) -> None:
    noise, (grad,) = noise_and_grads((3, 4, 33), 1, seed=4)
    checks.properties_of_direct_steps(noise, grad)


def test_gates() -> None:
    influence = torch.tensor([0.0, 0.1, 0.2])
    assert ops.boundary_gate(influence, 0.1).tolist() == [-1.0, 1.0, 1.0]
    assert ops.descent_gate(influence, 0.1).tolist() == [0.0, 1.0, 1.0]


def test_empty(backend: str) -> None:
    checks.steps_of_nothing(torch.empty(0, 4))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x [M, C, H, W] in another order or with gaps in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "reversed":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "gaps":
        window = torch.full((x.shape[0], 2, *x.shape[1:]), float("nan"), dtype=x.dtype)[:, 1]
        return window.copy_(x)
    return x.clone()


LAYOUTS = ["dense", "channels_last", "reversed", "gaps"]
STEPS = ["adamw", "normalized", "sign"]


def take(step: str, noise: torch.Tensor, grad: torch.Tensor, state: ops.AdamWState) -> None:
    gate = torch.tensor([1.0, 0.0, -1.0], device=noise.device)
    if step == "adamw":
        ops.adamw_step(noise, grad, state, gate, lr=0.1, weight_decay=0.01)
    else:
        (ops.normalized_step if step == "normalized" else ops.sign_step)(noise, grad, gate, lr=0.1)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_format_gives_the_same_bits(backend: str, layout: str, grad_layout: str, step: str) -> None:
    """In the caller's memory and strides, for the state too; gaps between the values stay NaN."""
    start, grads = noise_and_grads((3, 3, 4, 5), 2, seed=8)
    if grad_layout == "expanded":
        grads = [grad[:1, :, :1].expand(3, 3, 4, 5) for grad in grads]
    results = []
    for noise_in, grad_in in (("dense", "dense"), (layout, grad_layout)):
        noise = laid_out(start, noise_in)
        state = ops.AdamWState(*(laid_out(torch.zeros_like(start), noise_in) for _ in range(2)), torch.zeros(3).long())
        strides, address = noise.stride(), noise.data_ptr()
        for grad in grads:
            take(step, noise, grad if grad_in == "expanded" else laid_out(grad, grad_in), state)
        assert (noise.stride(), noise.data_ptr()) == (strides, address)
        if noise_in == "gaps":
            assert noise._base is not None
            assert noise._base[:, 0].isnan().all()
        results.append(torch.stack([noise, state.exp_avg, state.exp_avg_sq]))
    assert not results[0][0].equal(start)
    # the reference sums a norm in the order of the memory
    exact = backend != "reference" or step != "normalized"
    torch.testing.assert_close(results[1], results[0], rtol=0 if exact else 2.4e-7, atol=0 if exact else 1e-8)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12, 1e25, *checks.SIZES])
@pytest.mark.parametrize("width", [5, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_normalised_step_has_its_length_for_gradients_of_any_size(
    backend: str, dtype: torch.dtype, width: int, size: float
) -> None:
    grad, expected = checks.gradient_of_size(size, width, dtype)
    noise = torch.zeros(2, width)
    ops.normalized_step(noise, grad, lr=0.5)
    checks.normalized_step_of_length(noise, expected)


def test_float64_is_moved_as_float32() -> None:
    noise, (grad,) = noise_and_grads((2, 4, 6), 1, seed=5)
    wide = noise.double()
    ops.sign_step(noise, grad, lr=0.1)
    ops.sign_step(wide, grad, lr=0.1)
    torch.testing.assert_close(noise.double(), wide)


def test_bad_arguments_are_named() -> None:
    noise = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="noise must be float32 or float64"):
        ops.sign_step(noise.to(torch.bfloat16), noise, lr=0.1)
    with pytest.raises(ValueError, match="one shape"):
        ops.sign_step(noise, torch.zeros(2, 4), lr=0.1)
    with pytest.raises(ValueError, match=r"gate must be a number or have shape \[\] or \[2\]"):
        ops.sign_step(noise, noise, torch.ones(3), lr=0.1)
    with pytest.raises(ValueError, match="noise must not be expanded: it is changed in place"):
        ops.sign_step(torch.zeros(3).expand(2, 3), noise, lr=0.1)


def test_opcheck(backend: str) -> None:
    noise, (grad,) = noise_and_grads((2, 3, 4), 1, seed=6)
    gate, lr = torch.tensor([1.0, 0.0]), torch.full((2,), 0.1, dtype=torch.float64)
    state = ops.AdamWState.zeros(noise)
    moments = (state.exp_avg, state.exp_avg_sq, state.steps)
    testing.opcheck("adamw_step_", (noise, grad, *moments, gate, lr, 0.9, 0.999, 1e-8, 0.0))
    testing.opcheck("direct_step_", (noise, grad, gate, lr, True))
    testing.opcheck("direct_step_", (noise, grad, gate, lr, False))


def test_float64_gives_torchs_result() -> None:
    noise, grads = noise_and_grads((2, 3, 4), 3, seed=7)
    expected, wide = torch_adamw(noise.double(), grads, 0.01), noise.double()
    state = ops.AdamWState.zeros(wide)
    for grad in grads:
        ops.adamw_step(wide, grad, state, lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    torch.testing.assert_close(wide, expected, rtol=1e-13, atol=1e-14)
