"""Checks of every implementation of an op, on the device of the inputs: CPU, GPU or Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnull import ops, testing
from fastnull.ops.attention import attention_dqkv_ref, attention_dqkv_sdpa, attention_ref, attention_sdpa
from fastnull.ops.layer_norm import layer_norm_ref
from fastnull.ops.linear_gelu import decode_derivative, gelu_ref
from fastnull.ops.patch_project import patch_project_ref

Op = Callable[..., Tensor]
EPS = 1e-6
"""Of the LayerNorms."""
SIZES = [1e-44, 1e-38, 1e-23, 1.0, 1e19, 3e38]
"""Of gradients: squares of float32 underflow below 1e-23 and overflow above 1e19."""


def attention(qkv: Tensor, grad_o: Tensor, scale: float) -> None:
    """Output and packed gradient against float64."""
    with testing.poisoned():
        o, dqkv = ops.attention(qkv, scale), ops.attention_dqkv(qkv, grad_o, scale)
    testing.assert_within_budget(o, attention_sdpa(qkv.double(), scale), attention_sdpa(qkv, scale), "o")
    reference = attention_dqkv_sdpa(qkv.double(), grad_o.double(), scale)
    baseline = attention_dqkv_sdpa(qkv, grad_o, scale)
    for part, name in enumerate(("dq", "dk", "dv")):
        if qkv.shape[1] == 1 and name != "dv":  # one token: the softmax is constant
            assert dqkv[:, :, part].abs().max() <= 1e-6
        else:
            testing.assert_gradient_close(dqkv[:, :, part], reference[:, :, part], baseline[:, :, part], name)


def attention_rows_sum_to_one(qkv: Tensor, grad_o: Tensor) -> None:
    """With v = 1 the output is the row sum of the softmax, and the gradient of q and k is 0."""
    qkv[:, :, 2] = 1
    o, dqkv = ops.attention(qkv), ops.attention_dqkv(qkv, grad_o)
    torch.testing.assert_close(o, torch.ones_like(o), rtol=0, atol=1e-6)
    torch.testing.assert_close(dqkv[:, :, :2], torch.zeros_like(dqkv[:, :, :2]), rtol=0, atol=1e-5)


def attention_of_images_and_heads_alone(qkv: Tensor, grad_o: Tensor) -> None:
    """The order of the batch and the other heads change no bit, and a second run gives the same."""
    o, dqkv = ops.attention(qkv), ops.attention_dqkv(qkv, grad_o)
    assert ops.attention(qkv.flip(0)).equal(o.flip(0))
    assert ops.attention(qkv[:, :, :, 1:]).equal(o[:, :, 1:])
    assert ops.attention_dqkv(qkv[:, :, :, 1:], grad_o[:, :, 1:]).equal(dqkv[:, :, :, 1:])
    assert ops.attention_dqkv(qkv, grad_o).equal(dqkv)


def attention_of_nan(qkv: Tensor, grad_o: Tensor, part: int) -> None:
    """A NaN in q reaches its own row only, in k every row, in v one column of every row; never another head."""
    qkv[0, -1, part, 1, -1] = float("nan")
    scale = qkv.shape[-1] ** -0.5
    assert ops.attention(qkv).isnan().equal(attention_ref(qkv, scale).isnan())
    assert ops.attention_dqkv(qkv, grad_o).isnan().equal(attention_dqkv_ref(qkv, grad_o, scale).isnan())


def attention_of_nothing(qkv: Tensor) -> None:
    B, N, _, H, d = qkv.shape
    grad_o = qkv.new_empty(B, N, H, d)
    assert ops.attention(qkv).shape == grad_o.shape
    assert ops.attention_dqkv(qkv, grad_o).shape == qkv.shape


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None) -> None:
    """Output and statistics of x + shift against float64."""
    # An offset of 30 standard deviations in one channel: E[x^2] - mean^2 in float32 would lose its digits.
    x[..., 0] += 30
    wide, same = ([None if p is None else p.to(dtype) for p in (weight, bias)] for dtype in (torch.float64, x.dtype))
    x64, x32 = (x.to(dtype) + (0 if shift is None else shift) for dtype in (torch.float64, torch.float32))
    y64, mean64, rstd64 = layer_norm_ref(x64, *wide, eps=EPS)
    with testing.poisoned():
        y, mean, rstd = ops.layer_norm_stats(x, weight, bias, EPS, shift=shift)
    testing.assert_within_budget(y, y64, F.layer_norm(x32.to(x.dtype), x.shape[-1:], *same, EPS), "y")
    assert y.dtype == x.dtype
    assert mean.dtype == rstd.dtype == torch.float32
    testing.assert_within_budget(mean, mean64, x32.mean(-1), "mean")
    testing.assert_within_budget(rstd, rstd64, (x32.var(-1, correction=0) + EPS).rsqrt(), "rstd")


def layer_norm_gradient(x: Tensor, dxhat: Tensor, dres: Tensor | None) -> None:
    """Input gradient, from x and from the normalised rows, against float64."""

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).clone().requires_grad_()
        (dx,) = torch.autograd.grad(F.layer_norm(leaf, x.shape[-1:], eps=EPS), leaf, dxhat.to(dtype))
        return dx if dres is None else dx + dres.to(dtype)

    with testing.poisoned():
        xhat, mean, rstd = ops.layer_norm_stats(x, eps=EPS)
        results = [ops.layer_norm_dx(dxhat, *kept, rstd, dres) for kept in ((x, mean), (xhat, None))]
    for dx, name in zip(results, ("dx", "dx of normalised rows"), strict=True):
        testing.assert_gradient_close(dx, gradient(torch.float64), gradient(x.dtype), name)


def gradients(op: Op, reference: Op, inputs: list[Tensor], dy: Tensor) -> None:
    """Gradients of an op for all inputs (x, weight, bias) against float64."""

    def of(function: Op, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, dy.to(dtype))

    results = (of(op, dy.dtype), of(reference, torch.float64), of(reference, dy.dtype))
    for name, *values in zip(("dx", "dweight", "dbias"), *results, strict=True):
        testing.assert_gradient_close(*values, name)


def layer_norm_of_nan(x: Tensor) -> None:
    """NaN stays in its row."""
    x[1, 1, -1] = float("nan")
    y = ops.layer_norm(x)
    assert y[1, 1].isnan().all()
    assert int(y.isnan().sum()) == x.shape[-1]


def layer_norm_of_nothing(x: Tensor) -> None:
    y, mean, rstd = ops.layer_norm_stats(x)
    assert y.shape == ops.layer_norm_dx(x, x, mean, rstd, x).shape == x.shape


def gelu_slope(z: Tensor, kind: str) -> Tensor:
    """gelu'(z) by autograd."""
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(F.gelu(leaf, approximate=kind).sum(), leaf)[0]


def gelu_derivative(derivative: Tensor, reference: Tensor, baseline: Tensor) -> None:
    """A kept derivative, as float32 or in codes of 8 bits, against float64."""
    if derivative.dtype == torch.uint8:
        # Half a step of 0.005, and the rounding of z in float32.
        assert (decode_derivative(derivative).double() - reference).abs().max() <= 0.0025 + 1e-5
    else:
        testing.assert_within_budget(derivative, reference, baseline, "derivative")


def gelu(z: Tensor, bias: Tensor, kind: str, derivative: Tensor) -> None:
    """Value in place of z, and derivative, against float64."""
    z64, same, wide = z.double() + bias.double(), z + bias, z.float() + bias.float()
    assert ops.gelu_(z, bias, kind, derivative=derivative) is z
    testing.assert_within_budget(z, F.gelu(z64, approximate=kind), F.gelu(same, approximate=kind), "h")
    gelu_derivative(derivative, gelu_slope(z64, kind), gelu_slope(wide, kind))


def gelu_tails(kind: str, device: str, coded: torch.dtype) -> None:
    """Saturated ends: h = 0 or z, derivative 0 or 1, in both storages (the 8-bit one for a z of dtype `coded`). The
    tail keeps relative accuracy (erf)."""
    z = torch.tensor([[-1e30, -100.0, -40.0, -20.0, 20.0, 40.0, 1e10]], device=device)
    for dtype, kept in ((torch.float32, torch.float32), (coded, torch.uint8)):
        derivative = torch.empty_like(z, dtype=kept)
        h = ops.gelu_(z.to(dtype, copy=True), None, kind, derivative=derivative)
        torch.testing.assert_close(h, z.to(dtype).clamp(min=0), rtol=0, atol=1e-30)
        slope = decode_derivative(derivative) if kept == torch.uint8 else derivative
        torch.testing.assert_close(slope, (z > 0).float(), rtol=0, atol=1e-30)
    tail = torch.linspace(-12, -3, 50, device=device)[None]
    if kind == "none":
        torch.testing.assert_close(ops.gelu_(tail.clone()).double(), gelu_ref(tail.double())[0], rtol=2e-5, atol=0)


def gelu_of_nan(z: Tensor, kind: str, derivative: Tensor) -> None:
    """NaN goes through, in its own element only."""
    z[1, 18] = float("nan")
    ops.gelu_(z, None, kind, derivative=derivative)
    for result in (z, derivative) if derivative.dtype.is_floating_point else (z,):
        assert int(result.isnan().sum()) == 1
        assert result[1, 18].isnan()


def objective_by_autograd(clean: Tensor, noisy: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of its mean, and influence by plain torch operations and autograd."""
    leaf = noisy.clone().requires_grad_()
    norm = torch.linalg.vector_norm(leaf - clean, dim=1)
    loss = norm if kind == "l2" else norm.square()
    (cotangent,) = torch.autograd.grad(loss.mean(), leaf)
    return loss.detach(), cotangent, (clean.softmax(1) - noisy.softmax(1)).square().sum(1)


def noise_objective(clean: Tensor, noisy: Tensor, kind: str) -> None:
    """Loss, cotangent, influence and means against float64."""
    with testing.poisoned():
        result = ops.noise_objective(clean, noisy, kind)
    # The arithmetic is float32 whatever the storage: reference and budget start from the stored values.
    references = objective_by_autograd(clean.double(), noisy.double(), kind)
    baselines = objective_by_autograd(clean.float(), noisy.float(), kind)
    for name, reference, baseline in zip(("loss", "cotangent", "influence"), references, baselines, strict=True):
        assert getattr(result, name).dtype == torch.float32
        testing.assert_within_budget(getattr(result, name), reference, baseline, name)
    testing.assert_gradient_close(result.cotangent, references[1], baselines[1], "cotangent")
    torch.testing.assert_close(result.mean_loss, result.loss.mean().view(1))
    torch.testing.assert_close(result.mean_influence, result.influence.mean().view(1))


def torch_adamw(noise: Tensor, grads: list[Tensor], weight_decay: float = 0.0, lr: float = 0.1) -> Tensor:
    parameter = torch.nn.Parameter(noise.clone())
    optimiser = torch.optim.AdamW([parameter], lr, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=False)
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimiser.step()
    return parameter.detach()


def adamw(noise: Tensor, grads: list[Tensor], weight_decay: float) -> None:
    """Steps in the same order as torch's: within two units in the last place of its float32 result."""
    reference, baseline = (torch_adamw(x, grads, weight_decay) for x in (noise.double(), noise))
    state = ops.AdamWState.zeros(noise)
    for grad in grads:
        ops.adamw_step(noise, grad, state, lr=0.1, betas=(0.9, 0.99), weight_decay=weight_decay)
    testing.assert_within_budget(noise, reference, baseline)
    assert state.steps.tolist() == [len(grads)] * len(noise)


def adamw_gates(start: Tensor, grads: list[Tensor]) -> None:
    """Gate 0 changes nothing, its state included; a noise that pauses goes on as if it had not; -1 is -grad."""
    noise, state = start.clone(), ops.AdamWState.zeros(start)
    for grad, gate in zip(grads, ([1.0, 0.0, -1.0], [0.0, 0.0, -1.0], [1.0, 0.0, -1.0]), strict=True):
        ops.adamw_step(noise, grad, state, start.new_tensor(gate), lr=0.1, betas=(0.9, 0.99))
    assert noise[1].equal(start[1])
    assert not state.exp_avg[1].any()
    assert not state.exp_avg_sq[1].any()
    assert state.steps.tolist() == [2, 0, 3]
    torch.testing.assert_close(noise[0], torch_adamw(start[0], [grads[0][0], grads[2][0]]))
    torch.testing.assert_close(noise[2], torch_adamw(start[2], [-g[2] for g in grads]))


def direct_steps(noise: Tensor, grad: Tensor) -> None:
    """Normalised and sign steps with a gate and a rate for each noise, against float64."""
    grad[0, 0] = 0
    gate = noise.new_tensor([-1.0, 1.0, 0.0, 1.0])[: len(noise)]
    rates = noise.new_tensor([0.5, 0.25, 0.5, 0.1])[: len(noise)]
    column = (gate * rates).double().view(-1, *[1] * (noise.ndim - 1))
    norms = torch.linalg.vector_norm(grad.double().flatten(1), dim=1).view_as(column)
    for step, direction in ((ops.normalized_step, grad.double() / norms), (ops.sign_step, grad.double().sign())):
        moved, expected = noise.clone(), noise.double() - column * direction
        with testing.poisoned():
            step(moved, grad, gate, lr=rates)
        testing.assert_within_budget(moved, expected, expected.float(), step.__name__)
        assert moved[2:3].equal(noise[2:3])


def properties_of_direct_steps(noise: Tensor, grad: Tensor) -> None:
    """A normalised step has length lr; a zero gradient moves nothing; NaN goes through."""
    grad[1] = 0
    moved, signed = noise.clone(), noise.clone()
    ops.normalized_step(moved, grad, lr=0.25)
    ops.sign_step(signed, grad, lr=0.25)
    lengths = (moved - noise).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths.cpu(), torch.tensor([0.25, 0.0, 0.25]), rtol=0, atol=1e-6)
    assert signed[1].equal(noise[1])
    grad[2, -1, -1] = float("nan")
    for step in (ops.normalized_step, ops.sign_step):
        spoilt = noise.clone()
        step(spoilt, grad, lr=0.25)
        assert spoilt[2, -1, -1].isnan()
        assert spoilt[:2].isfinite().all()


def steps_of_nothing(noise: Tensor) -> None:
    ops.adamw_step(noise, noise, ops.AdamWState.zeros(noise), lr=0.1)
    ops.normalized_step(noise, noise, lr=0.1)
    ops.sign_step(noise, noise, lr=0.1)


def gradient_of_size(size: float, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two gradients [2, width], the second 0, and the first one's normalised step of length 0.5 in float64."""
    size = max(size, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)  # the smallest there is
    direction = torch.linspace(-1, 1, width, dtype=torch.float64)
    grad = (torch.stack([direction, torch.zeros(width)]) * size).to(dtype)
    assert grad[0].isfinite().all()
    assert grad[0].any()
    return grad, -0.5 * grad[0].double() / grad[0].double().norm()


def normalized_step_of_length(noise: Tensor, expected: Tensor) -> None:
    """`noise` [2, width] started from 0 and did the step of `gradient_of_size`."""
    torch.testing.assert_close(noise[0].cpu().double(), expected, rtol=1e-6, atol=1e-9)
    assert not noise[1].any()


@functools.cache  # the decomposition of a 3072-wide embedding takes seconds
def bases(C: int, p: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random embedding W [D, C p^2], and float64 bases of its nullspace [C p^2, k] and row space [C p^2, D]."""
    W = torch.randn(D, C * p * p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = torch.linalg.svd(W, full_matrices=True)[2].t()
    return W, full[:, D:], full[:, :D]


def projection(out: Tensor, noise: Tensor, basis: Tensor, p: int, complement: bool, images: Tensor | None) -> None:
    """`out` is the projection of the noise by a float64 basis, added to images if there are any, against float64."""
    reference = patch_project_ref(noise.double(), basis, p, complement, None if images is None else images.double())
    baseline = patch_project_ref(noise, basis.float(), p, complement, images)
    testing.assert_gradient_close(out, reference, baseline, "projection")


def leak(W: Tensor, result: Tensor, noise: Tensor, p: int) -> None:
    """||W P v|| / (||W|| ||v||) <= 1e-6 in float32, and P v is not 0."""
    tokens = F.conv2d(result.double(), W.view(len(W), -1, p, p), stride=p)
    assert tokens.norm() / (torch.linalg.matrix_norm(W, 2) * noise.norm()) <= 1e-6
    assert result.norm() > 0.5 * noise.norm()
