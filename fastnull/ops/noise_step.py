"""One step of many noises at once, in place, each with its own gate, without a host sync.

The gate [M] of a noise is 0 (noise and optimiser state do not change), +1 (descend) or -1 (ascend), so that a stop rule
or the boundary rule is one `torch.where` on the device:

    AdamW (torch.optim.AdamW's formula and order), g = gate * grad:
        v *= 1 - lr * weight_decay;  m += (1 - beta1) (g - m);  s = beta2 s + (1 - beta2) g^2
        v -= lr / (1 - beta1^t) * m / (sqrt(s) / sqrt(1 - beta2^t) + eps)
    normalised:  v -= gate * lr * grad / ||grad||        (the norm over the whole noise; no step if it is 0)
                 Squares in the norm neither underflow nor overflow: gradients may be as small as 1e-40.
    sign:        v -= gate * lr * sign(grad)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnull.ops.common import define, use_native


@dataclass(frozen=True)
class AdamWState:
    """AdamW state of M noises: the two moments, shaped like the noises, and the number of steps [M] (int64)."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor

    @classmethod
    def zeros(cls, noise: Tensor) -> AdamWState:
        """The state before the first step of noise [M, ...]."""
        steps = torch.zeros(noise.shape[0], dtype=torch.int64, device=noise.device)
        zeros = torch.zeros_like(noise, memory_format=torch.contiguous_format)
        return cls(zeros, zeros.clone(), steps)


def _column(x: Tensor, like: Tensor) -> Tensor:
    """[M] → [M, 1, ...] to broadcast over `like`."""
    return x.to(like.dtype).view(-1, *(1 for _ in range(like.ndim - 1)))


def adamw_step_ref(
    noise: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    gate: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_step` in plain torch, on the tensors of the state."""
    moves = _column(gate, noise) != 0
    steps.add_(gate != 0)
    lr = lr.double()
    g = grad.to(noise.dtype) * _column(gate, noise)
    m = torch.lerp(exp_avg, g, 1 - beta1)
    s = (exp_avg_sq * beta2).addcmul(g, g, value=1 - beta2)
    count = steps.clamp(min=1).double()
    step_size = _column(lr / (1 - beta1**count), noise)
    denominator = s.sqrt() / _column((1 - beta2**count).sqrt(), noise) + eps
    v = noise * _column(1 - lr * weight_decay, noise) - step_size * m / denominator
    for old, new in ((noise, v), (exp_avg, m), (exp_avg_sq, s)):
        old.copy_(torch.where(moves, new, old))


def direct_step_ref(noise: Tensor, grad: Tensor, gate: Tensor, lr: Tensor, sign: bool) -> None:
    """`normalized_step` and `sign_step` in plain torch."""
    g = grad.to(noise.dtype)
    if sign:
        direction = g.sign() + g * 0  # propagates NaN, whose sign is 0
    else:
        # in float64 the square of a float32 neither underflows nor overflows
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64)
        inverse = torch.where(norm == 0, 0.0, 1 / norm).view(-1, *[1] * (g.ndim - 1))
        direction = (g * inverse).to(noise.dtype)
    moved = noise - direction * (_column(gate, noise) * _column(lr, noise))
    noise.copy_(torch.where(_column(gate, noise) != 0, moved, noise))


define(
    "adamw_step_(Tensor(a!) noise, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) steps,"
    " Tensor gate, Tensor lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    adamw_step_ref,
)
define("direct_step_(Tensor(a!) noise, Tensor grad, Tensor gate, Tensor lr, bool sign) -> ()", direct_step_ref)


def _per_noise(name: str, value: Tensor | float, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or a tensor [] or [M] as a dense tensor [M] on the noise's device."""
    M = noise.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((M,), float(value), dtype=dtype, device=noise.device)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != M):
        raise ValueError(f"{name} must be a number or have shape [] or [{M}]; got {list(value.shape)}")
    return value.to(dtype).expand(M).contiguous()


def _check(noise: Tensor, grad: Tensor) -> None:
    if noise.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"noise must be float32 or float64 (narrower dtypes lose small steps); got {noise.dtype}")
    if any(stride == 0 and size > 1 for stride, size in zip(noise.stride(), noise.shape, strict=True)):
        raise ValueError(f"noise must not be expanded: it is changed in place; its strides are {noise.stride()}")
    if noise.ndim < 2 or grad.shape != noise.shape:
        raise ValueError(f"noise and grad must have one shape [M, ...]; got {list(noise.shape)}, {list(grad.shape)}")


@contextmanager
def _dense(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Dense versions of the tensors for a kernel; copied back after the block if needed."""
    dense = [tensor.contiguous() for tensor in tensors]
    yield dense
    for tensor, written in zip(tensors, dense, strict=True):
        if written is not tensor:
            tensor.copy_(written)


def _native(noise: Tensor, grad: Tensor) -> bool:
    return noise.dtype == torch.float32 and use_native("noise_step", noise, grad)


@torch.no_grad()
def adamw_step(
    noise: Tensor,
    grad: Tensor,
    state: AdamWState,
    gate: Tensor | float = 1.0,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step of each noise whose gate is not 0, in place.

    Args:
        noise: [M, ...], float32 or float64, any strides (copied twice if not dense).
        grad: [M, ...], any floating dtype and strides.
        state: from `AdamWState.zeros(noise)`, updated in place.
        gate: [M], [] or a number: 0 stays, +1 descends, -1 ascends.
        lr: step size, [M], [] or a number.
        betas, eps, weight_decay: as in `torch.optim.AdamW`, whose default weight decay is 0.01.
    """
    _check(noise, grad)
    gates = _per_noise("gate", gate, noise, torch.float32)
    rates = _per_noise("lr", lr, noise, torch.float64)
    settings = (gates, rates, *betas, eps, weight_decay)
    if _native(noise, grad):
        with _dense(noise, state.exp_avg, state.exp_avg_sq, state.steps) as (v, *moments):
            torch.ops.fastnull.adamw_step_(v, grad.contiguous(), *moments, *settings)
    else:
        adamw_step_ref(noise, grad, state.exp_avg, state.exp_avg_sq, state.steps, *settings)


def _direct_step(noise: Tensor, grad: Tensor, gate: Tensor | float, lr: Tensor | float, sign: bool) -> None:
    _check(noise, grad)
    gates = _per_noise("gate", gate, noise, torch.float32)
    rates = _per_noise("lr", lr, noise, torch.float64)
    if _native(noise, grad):
        with _dense(noise) as (v,):
            torch.ops.fastnull.direct_step_(v, grad.contiguous(), gates, rates, sign)
    else:
        direct_step_ref(noise, grad, gates, rates, sign)


@torch.no_grad()
def normalized_step(noise: Tensor, grad: Tensor, gate: Tensor | float = 1.0, *, lr: Tensor | float) -> None:
    """Move each noise [M, ...] by lr along its normalised gradient, in place; see `adamw_step`."""
    _direct_step(noise, grad, gate, lr, sign=False)


@torch.no_grad()
def sign_step(noise: Tensor, grad: Tensor, gate: Tensor | float = 1.0, *, lr: Tensor | float) -> None:
    """Move each element of the noises [M, ...] by lr along the gradient's sign, in place; see `adamw_step`."""
    _direct_step(noise, grad, gate, lr, sign=True)


def boundary_gate(influence: Tensor, eps: float | Tensor) -> Tensor:
    """Gate of the boundary rule: +1 (descend) where influence [M] >= eps, -1 (ascend) below."""
    return torch.where(influence >= eps, 1.0, -1.0)


def descent_gate(influence: Tensor, eps: float | Tensor) -> Tensor:
    """Gate of the stop rule: +1 (descend) where influence [M] >= eps, 0 (stay) below."""
    return torch.where(influence >= eps, 1.0, 0.0)
