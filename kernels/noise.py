"""Objective and gated step of noise synthesis (formulas: ops/noise_objective, noise_step).

Objective: a program reads one pair of rows of logits once and writes loss, cotangent and influence. Steps: a program
handles a chunk of a row of the noise [M, n]. It reads the gate of the row and writes nothing if the gate is 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dense, check_dtypes, on_device_of
from fastnull.ops.common import empty

# Untuned: 8 elements a lane. A chunk is also the unit of the partial sums of squares.
CHUNK, WARPS = 1024, 4
LOG2_E = tl.constexpr(1.4426950408889634)  # kernels can only read globals of this type


@triton.jit
def _softmax(x, valid):
    e = tl.where(valid, tl.exp2((x - tl.max(tl.where(valid, x, float("-inf")), 0)) * LOG2_E), 0.0)
    return e / tl.sum(e, 0)


@triton.jit
def noise_objective_kernel(
    clean,  # [B0, K], dense in K: noisy row i belongs to clean row i % B0
    noisy,  # [B, K], dense in K
    loss,  # [B] float32
    cotangent,  # [B, K] dense float32
    influence,  # [B] float32
    B0,
    K,
    clean_row,
    noisy_row,
    scale,
    SQUARED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    valid = column < K
    a = tl.load(clean + row % B0 * clean_row + column, valid, 0.0).to(tl.float32)
    b = tl.load(noisy + row * noisy_row + column, valid, 0.0).to(tl.float32)
    delta = b - a
    square = tl.sum(delta * delta, 0)
    if SQUARED:
        length, factor = square, 2 * scale
    else:
        length = tl.sqrt_rn(square)
        factor = tl.where(length == 0, 0.0, scale / length)
    moved = _softmax(a, valid) - _softmax(b, valid)
    tl.store(loss + row, length)
    tl.store(cotangent + row * K + column, delta * factor, valid)
    tl.store(influence + row, tl.sum(moved * moved, 0))


@triton.jit
def adamw_kernel(
    noise,  # [M, n] dense float32
    grad,  # [M, n] dense
    exp_avg,  # [M, n] dense float32
    exp_avg_sq,  # [M, n] dense float32
    steps,  # [M] int64, this step counted already
    gate,  # [M] float32
    lr,  # [M] float64
    n,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    log2_beta1,
    log2_beta2,
    eps,
    weight_decay,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(n, CHUNK)
    which = tl.program_id(0) // chunks
    turn = tl.load(gate + which)
    if turn != 0:
        within = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
        at, valid = which.to(tl.int64) * n + within, within < n
        g = tl.load(grad + at, valid, 0.0).to(tl.float32) * turn
        m = tl.load(exp_avg + at, valid, 0.0)
        s = tl.load(exp_avg_sq + at, valid, 0.0)
        m += one_minus_beta1 * (g - m)
        s = s * beta2 + one_minus_beta2 * g * g
        # float64: 1 - beta^t loses its digits in float32 while t is small.
        count, rate = tl.load(steps + which).to(tl.float64), tl.load(lr + which)
        step_size = (rate / (1 - tl.exp2(count * log2_beta1))).to(tl.float32)
        correction = tl.sqrt(1 - tl.exp2(count * log2_beta2)).to(tl.float32)
        v = tl.load(noise + at, valid, 0.0) * (1 - rate * weight_decay).to(tl.float32)
        denominator = tl.div_rn(tl.sqrt_rn(s), tl.zeros_like(s) + correction) + eps
        tl.store(noise + at, v - tl.div_rn(step_size * m, denominator), valid)
        tl.store(exp_avg + at, m, valid)
        tl.store(exp_avg_sq + at, s, valid)


@triton.jit
def square_sums_kernel(
    grad,  # [M, n] dense
    sums,  # [M, chunks] float64, written: there the square of a float32 neither underflows nor overflows
    n,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(n, CHUNK)
    within = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    at = (tl.program_id(0) // chunks).to(tl.int64) * n + within
    g = tl.load(grad + at, within < n, 0.0).to(tl.float32).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def direct_step_kernel(
    noise,  # [M, n] dense float32
    grad,  # [M, n] dense
    sums,  # [M, chunks] float64: squares of the gradient; None: step along its sign
    gate,  # [M] float32
    lr,  # [M] float64
    n,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    chunks = tl.cdiv(n, CHUNK)
    which = tl.program_id(0) // chunks
    turn = tl.load(gate + which)
    if turn != 0:
        within = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
        at, valid = which.to(tl.int64) * n + within, within < n
        g = tl.load(grad + at, valid, 0.0).to(tl.float32)
        if sums is None:
            # The innermost g is 0 or NaN.
            direction = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
        else:
            chunk = tl.arange(0, CHUNKS)
            partial = tl.load(sums + which * chunks + chunk, chunk < chunks, 0.0)
            norm = tl.sqrt(tl.sum(partial, 0))
            direction = (g.to(tl.float64) * tl.where(norm == 0, 0.0, 1 / norm)).to(tl.float32)
        step = turn * tl.load(lr + which).to(tl.float32)
        tl.store(noise + at, tl.load(noise + at, valid, 0.0) - direction * step, valid)


def noise_objective_out(
    clean: Tensor, noisy: Tensor, squared: bool, scale: float, loss: Tensor, cotangent: Tensor, influence: Tensor
) -> None:
    """Launcher of `torch.ops.fastnull.noise_objective_out`: clean [B0, K], noisy [B, K], dense in K; B0 divides B."""
    check_dtypes(clean=clean, noisy=noisy)
    check_dense(loss=loss, cotangent=cotangent, influence=influence)
    B, K = noisy.shape
    if not noisy.numel():
        return
    width = triton.next_power_of_2(K)
    with on_device_of(noisy):
        noise_objective_kernel[(B,)](
            clean, noisy, loss, cotangent, influence, clean.shape[0], K, clean.stride(0), noisy.stride(0), scale,
            SQUARED=squared, WIDTH=width, num_warps=min(max(width // 512, 1), 16), **COMPILE,
        )  # fmt: skip


def _check_noise(noise: Tensor, grad: Tensor, **rest: Tensor) -> None:
    check_dtypes(grad=grad)
    if noise.dtype != torch.float32:
        raise TypeError(f"noise must be float32 for the Triton kernels; got {noise.dtype}")
    check_dense(noise=noise, grad=grad, **rest)


def adamw_step_(
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
    """Launcher of `torch.ops.fastnull.adamw_step_`: noise, grad and moments [M, ...] dense; gate, lr, steps [M]."""
    _check_noise(noise, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, steps=steps, gate=gate, lr=lr)
    if not noise.numel():
        return
    # Counted before the kernel, because all of its programs read the count.
    steps.add_(gate != 0)
    n = noise[0].numel()
    logs = [math.log2(beta) if beta else -math.inf for beta in (beta1, beta2)]
    with on_device_of(noise):
        adamw_kernel[(len(noise) * triton.cdiv(n, CHUNK),)](
            noise, grad, exp_avg, exp_avg_sq, steps, gate, lr, n, 1 - beta1, beta2, 1 - beta2, *logs, eps, weight_decay,
            CHUNK=CHUNK, num_warps=WARPS, **COMPILE,
        )  # fmt: skip


def direct_step_(noise: Tensor, grad: Tensor, gate: Tensor, lr: Tensor, sign: bool) -> None:
    """Launcher of `torch.ops.fastnull.direct_step_`: noise, grad [M, ...] dense; gate, lr [M]."""
    _check_noise(noise, grad, gate=gate, lr=lr)
    if not noise.numel():
        return
    M, n = len(noise), noise[0].numel()
    chunks = triton.cdiv(n, CHUNK)
    sums = None if sign else empty((M, chunks), dtype=torch.float64, device=noise.device)
    constants = {"CHUNK": CHUNK, "num_warps": WARPS, **COMPILE}
    with on_device_of(noise):
        if sums is not None:
            square_sums_kernel[(M * chunks,)](grad, sums, n, **constants)
        width = triton.next_power_of_2(chunks)
        direct_step_kernel[(M * chunks,)](noise, grad, sums, gate, lr, n, CHUNKS=width, **constants)
