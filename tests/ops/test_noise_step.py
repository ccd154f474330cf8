"""Steps of many noises at once, every CPU backend against torch's optimiser and float64."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from fastnull.ops.noise_step import adamw_step_ref

BACKENDS = testing.cpu_backends()
# Noise shapes: [M, N, D] of tokens; a width that is no multiple of a vector, and is larger than one thread's part
# (32768 elements), so that ranges begin inside a noise; a width under one vector.
SHAPES = [(3, 5, 96), (2, 3, 112, 111), (4, 3)]


def noise_and_grads(shape: tuple[int, ...], steps: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(steps)]


def torch_adamw(noise: torch.Tensor, grads: list[torch.Tensor], **options: float) -> torch.Tensor:
    parameter = torch.nn.Parameter(noise.clone())
    optimiser = torch.optim.AdamW([parameter], betas=(0.9, 0.99), foreach=False, **options)
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_is_torchs(backend: str, shape: tuple[int, ...], weight_decay: float) -> None:
    noise, grads = noise_and_grads(shape, 4)
    reference = torch_adamw(noise.double(), grads, lr=0.1, weight_decay=weight_decay)
    baseline = torch_adamw(noise, grads, lr=0.1, weight_decay=weight_decay)
    state = ops.AdamWState.zeros(noise)
    with testing.use_backend(backend):
        for grad in grads:
            ops.adamw_step(noise, grad, state, lr=0.1, betas=(0.9, 0.99), weight_decay=weight_decay)
    testing.assert_within_budget(noise, reference, baseline)
    # Four steps of float32 in the same order: within two units in the last place of torch's own result.
    torch.testing.assert_close(noise, baseline, rtol=2.4e-7, atol=1.2e-7)
    assert state.steps.tolist() == [4] * shape[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_freezes_bit_for_bit_and_turns_around(backend: str) -> None:
    """Gate 0 touches nothing, its state included; a noise that pauses goes on as if it had not; -1 is -grad."""
    start, grads = noise_and_grads((3, 7, 9), 3, seed=1)
    noise, state = start.clone(), ops.AdamWState.zeros(start)
    gates = [torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, -1.0])]
    with testing.use_backend(backend):
        for grad, gate in zip(grads, gates, strict=True):
            ops.adamw_step(noise, grad, state, gate, lr=0.1, betas=(0.9, 0.99))
    assert noise[1].equal(start[1])
    assert not state.exp_avg[1].any()
    assert not state.exp_avg_sq[1].any()
    assert state.steps.tolist() == [2, 0, 3]
    torch.testing.assert_close(noise[0], torch_adamw(start[0], [grads[0][0], grads[2][0]], lr=0.1, weight_decay=0.0))
    torch.testing.assert_close(noise[2], torch_adamw(start[2], [-g[2] for g in grads], lr=0.1, weight_decay=0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradient_and_a_rate_for_each_noise(backend: str) -> None:
    noise, (grad,) = noise_and_grads((2, 5, 20), 1, seed=2)
    grad, rates = grad.to(torch.bfloat16), torch.tensor([0.1, 0.02])
    expected = torch.stack([torch_adamw(noise[m], [grad[m]], lr=rates[m].item(), weight_decay=0.0) for m in range(2)])
    with testing.use_backend(backend):
        ops.adamw_step(noise, grad, ops.AdamWState.zeros(noise), lr=rates, betas=(0.9, 0.99))
    torch.testing.assert_close(noise, expected, rtol=2.4e-7, atol=1.2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_direct_steps(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise, (grad,) = noise_and_grads(shape, 1, seed=3)
    grad = grad.to(dtype)
    grad[0, 0] = 0
    gate = torch.tensor([1.0, -1.0, 0.0, 1.0])[: shape[0]]
    column = gate.view(-1, *[1] * (len(shape) - 1))
    norms = torch.linalg.vector_norm(grad.double().flatten(1), dim=1).view_as(column)
    expected = {
        "normalized": noise.double() - 0.5 * column * grad.double() / norms,
        "sign": noise.double() - 0.5 * column * grad.double().sign(),
    }
    for kind, step in (("normalized", ops.normalized_step), ("sign", ops.sign_step)):
        moved = noise.clone()
        with testing.use_backend(backend):
            step(moved, grad, gate, lr=0.5)
        testing.assert_within_budget(moved, expected[kind], expected[kind].float(), kind)
        if shape[0] > 2:
            assert moved[2].equal(noise[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_properties_of_direct_steps(backend: str) -> None:
    """A normalised step has length lr; a zero gradient moves nothing; NaN goes through."""
    noise, (grad,) = noise_and_grads((3, 4, 33), 1, seed=4)
    grad[1] = 0
    moved, signed = noise.clone(), noise.clone()
    with testing.use_backend(backend):
        ops.normalized_step(moved, grad, lr=0.25)
        ops.sign_step(signed, grad, lr=0.25)
        lengths = (moved - noise).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.tensor([0.25, 0.0, 0.25]), rtol=0, atol=1e-6)
        assert signed[1].equal(noise[1])
        grad[2, 3, 32] = float("nan")
        for step in (ops.normalized_step, ops.sign_step):
            spoilt = noise.clone()
            step(spoilt, grad, lr=0.25)
            assert spoilt[2, 3, 32].isnan()
            assert spoilt[:2].isfinite().all()


def test_gates() -> None:
    influence = torch.tensor([0.0, 0.1, 0.2])
    assert ops.boundary_gate(influence, 0.1).tolist() == [-1.0, 1.0, 1.0]
    assert ops.descent_gate(influence, 0.1).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    noise = torch.empty(0, 4)
    with testing.use_backend(backend):
        ops.adamw_step(noise, noise, ops.AdamWState.zeros(noise), lr=0.1)
        ops.sign_step(noise, noise, lr=0.1)


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
    gate = torch.tensor([1.0, 0.0, -1.0])
    if step == "adamw":
        ops.adamw_step(noise, grad, state, gate, lr=0.1, weight_decay=0.01)
    else:
        (ops.normalized_step if step == "normalized" else ops.sign_step)(noise, grad, gate, lr=0.1)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_memory_format_gives_the_same_bits(backend: str, layout: str, grad_layout: str, step: str) -> None:
    """In place: in the caller's memory and its strides, the state's too; what lies between the values stays NaN."""
    start, grads = noise_and_grads((3, 3, 4, 5), 2, seed=8)
    if grad_layout == "expanded":
        grads = [grad[:1, :, :1].expand(3, 3, 4, 5) for grad in grads]
    results = []
    for noise_in, grad_in in (("dense", "dense"), (layout, grad_layout)):
        noise = laid_out(start, noise_in)
        state = ops.AdamWState(*(laid_out(torch.zeros_like(start), noise_in) for _ in range(2)), torch.zeros(3).long())
        strides, address = noise.stride(), noise.data_ptr()
        with testing.use_backend(backend):
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


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e-23, 1e-12, 1.0, 1e12, 1e19, 1e25, 3e38])
@pytest.mark.parametrize("width", [5, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_normalised_step_has_its_length_for_gradients_of_any_size(
    backend: str, dtype: torch.dtype, width: int, size: float
) -> None:
    direction = torch.linspace(-1, 1, width, dtype=torch.float64)
    size = max(size, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)  # the smallest there is
    grad = (torch.stack([direction, torch.zeros(width)]) * size).to(dtype)
    assert grad[0].isfinite().all()
    assert grad[0].any()
    noise = torch.zeros(2, width)
    with testing.use_backend(backend):
        ops.normalized_step(noise, grad, lr=0.5)
    expected = -0.5 * grad[0].double() / grad[0].double().norm()
    torch.testing.assert_close(noise[0].double(), expected, rtol=1e-6, atol=1e-9)
    assert not noise[1].any()


def test_strided_gradient_and_float64() -> None:
    noise, (grad,) = noise_and_grads((2, 4, 6), 1, seed=5)
    transposed = grad.transpose(1, 2).contiguous().transpose(1, 2)
    a, b, c = noise.clone(), noise.clone(), noise.double()
    ops.sign_step(a, grad, lr=0.1)
    ops.sign_step(b, transposed, lr=0.1)
    ops.sign_step(c, grad, lr=0.1)
    assert a.equal(b)
    torch.testing.assert_close(a.double(), c)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    noise, (grad,) = noise_and_grads((2, 3, 4), 1, seed=6)
    gate, lr = torch.tensor([1.0, 0.0]), torch.full((2,), 0.1, dtype=torch.float64)
    state = ops.AdamWState.zeros(noise)
    moments = (state.exp_avg, state.exp_avg_sq, state.steps)
    with testing.use_backend(backend):
        testing.opcheck("adamw_step_", (noise, grad, *moments, gate, lr, 0.9, 0.999, 1e-8, 0.0))
        testing.opcheck("direct_step_", (noise, grad, gate, lr, True))
        testing.opcheck("direct_step_", (noise, grad, gate, lr, False))


def test_reference_takes_float64_to_torchs_result() -> None:
    noise, grads = noise_and_grads((2, 3, 4), 3, seed=7)
    wide = noise.double()
    state = ops.AdamWState.zeros(wide)
    for grad in grads:
        one = torch.ones(2)
        moments = (state.exp_avg, state.exp_avg_sq, state.steps)
        adamw_step_ref(wide, grad, *moments, one, one.double() * 0.1, 0.9, 0.99, 1e-8, 0.01)
    expected = torch_adamw(noise.double(), grads, lr=0.1, weight_decay=0.01)
    torch.testing.assert_close(wide, expected, rtol=1e-13, atol=1e-14)
