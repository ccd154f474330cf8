"""A linear layer followed by GELU that keeps GELU's derivative, and the input gradient of the linear after it.

    z = x W^T + b;  h = gelu(z);  derivative = gelu'(z)                      (forward, W of the first linear)
    dz = (dy W) * derivative                                                 (backward, W of the second linear)

    erf:  gelu(z) = z Phi(z),  gelu'(z) = Phi(z) + z phi(z)
    tanh: gelu(z) = z s,  s = sigmoid(2 u),  u = sqrt(2 / pi) (z + 0.044715 z^3),  gelu'(z) = s + 2 z s (1 - s) u'(z)

The matrix products are the library's; bias, GELU and derivative are one pass over its output, in place. Saved for the
backward is the derivative alone, not z: in float32 as float32 (4 bytes per element); in bfloat16 as one byte.

The byte: gelu' lies in [-0.1292, 1.1292], code = round(200 gelu') + 26, so a step is 0.005 and the saturated ends 0 and
1 are exact. The error is at most 0.0025, about that of rounding the derivative near 1 to bfloat16 (0.002).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastnull.checks import check_choice
from fastnull.ops.common import compute_dtype, define, empty, needs_grad, rows_out, use_native

CODES_PER_UNIT = 200
CODE_OF_ZERO = 26


def encode_derivative(derivative: Tensor) -> Tensor:
    """gelu' as the one-byte code of the module docstring."""
    return (derivative * CODES_PER_UNIT).round().add(CODE_OF_ZERO).clamp(0, 255).to(torch.uint8)


def decode_derivative(code: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `encode_derivative`; a floating tensor is returned as it is, in `dtype`."""
    if code.dtype != torch.uint8:
        return code.to(dtype)
    return (code.to(dtype) - CODE_OF_ZERO) / CODES_PER_UNIT


def gelu_ref(z: Tensor, bias: Tensor | None = None, approximate: str = "none") -> tuple[Tensor, Tensor]:
    """gelu(z + bias) in z.dtype and gelu'(z + bias) in the compute dtype, in plain torch."""
    wide = z.to(compute_dtype(z.dtype))
    if bias is not None:
        wide = wide + bias
    if approximate == "tanh":
        slope = math.sqrt(2 / math.pi)
        # At |z| = 10, s is 0 or 1 to within 1e-37; beyond, the cube would overflow and infinity meet zero.
        held = wide.clamp(-10, 10)
        u = slope * (held + 0.044715 * held**3)
        s, rest = torch.sigmoid(2 * u), torch.sigmoid(-2 * u)  # rest = 1 - s, with its digits
        h = wide.clamp(min=-10) * s
        derivative = s + 2 * held * s * rest * slope * (1 + 3 * 0.044715 * held**2)
    else:
        # erfc and not 1 + erf: the latter has no digits left in the negative tail.
        cdf = 0.5 * torch.erfc(-wide / math.sqrt(2))
        h = wide * cdf
        derivative = cdf + wide * torch.exp(-0.5 * wide.square()) / math.sqrt(2 * math.pi)
    return h.to(z.dtype), derivative


def _gelu_out_ref(z: Tensor, bias: Tensor | None, tanh: bool, h: Tensor, derivative: Tensor | None) -> None:
    value, slope = gelu_ref(z, bias, "tanh" if tanh else "none")
    h.copy_(value)
    if derivative is not None:
        kept = encode_derivative(slope) if derivative.dtype == torch.uint8 else slope
        derivative.copy_(kept.view(derivative.shape))


def _dgelu_ref(g: Tensor, derivative: Tensor) -> None:
    wide = compute_dtype(g.dtype)
    g.copy_(g.to(wide) * decode_derivative(derivative, wide))


def _linear_gelu_out_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, h: Tensor, derivative: Tensor | None
) -> None:
    torch.mm(x, weight.t(), out=h)
    _gelu_out_ref(h, bias, tanh, h, derivative)


def _linear_dgelu_out_ref(dy: Tensor, weight: Tensor, derivative: Tensor, dz: Tensor) -> None:
    torch.mm(dy, weight, out=dz)
    _dgelu_ref(dz, derivative)


def linear_gelu_apart(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, h: Tensor, derivative: Tensor | None
) -> None:
    """`linear_gelu_out` by the library's product and a pass over its result."""
    torch.mm(x, weight.t(), out=h)
    z = h.unsqueeze(0)
    torch.ops.fastnull.gelu_out(z, bias, tanh, z, derivative)


def linear_dgelu_apart(dy: Tensor, weight: Tensor, derivative: Tensor, dz: Tensor) -> None:
    """`linear_dgelu_out` by the library's product and a pass over its result."""
    torch.mm(dy, weight, out=dz)
    torch.ops.fastnull.dgelu_(dz.unsqueeze(0), derivative)


define("gelu_out(Tensor z, Tensor? bias, bool tanh, Tensor(a!) h, Tensor(b!)? derivative) -> ()", _gelu_out_ref)
define("dgelu_(Tensor(a!) g, Tensor derivative) -> ()", _dgelu_ref)
# Product and pass in one kernel, where there is one.
define(
    "linear_gelu_out(Tensor x, Tensor weight, Tensor? bias, bool tanh, Tensor(a!) h, Tensor(b!)? derivative) -> ()",
    _linear_gelu_out_ref,
)
define("linear_dgelu_out(Tensor dy, Tensor weight, Tensor derivative, Tensor(a!) dz) -> ()", _linear_dgelu_out_ref)


def derivative_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the derivative of a layer of this dtype is kept by default; uint8 codes fit any."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.uint8


def gelu_(
    z: Tensor, bias: Tensor | None = None, approximate: str = "none", *, derivative: Tensor | None = None
) -> Tensor:
    """h = gelu(z + bias), written over z; no autograd.

    Args:
        z: [..., D], float32, bfloat16 or float64, overwritten.
        bias: [D] or None.
        approximate: "none" (erf) or "tanh", as in `torch.nn.GELU`.
        derivative: [..., D] dense, of `derivative_dtype(z.dtype)` or uint8, to take gelu'(z + bias); None: not wanted.

    Returns:
        z.
    """
    check_choice("approximate", approximate, ("none", "tanh"))
    tanh = approximate == "tanh"
    if use_native("linear_gelu", z):
        wide_bias = bias
        if bias is not None:  # the kernels of the GPU take any dtype: a cast would be a launch of its own
            wide_bias = (bias.to(torch.float32) if z.device.type == "cpu" else bias).contiguous()
        view = rows_out(z, "z")
        torch.ops.fastnull.gelu_out(view, wide_bias, tanh, view, derivative)
    else:
        _gelu_out_ref(z, bias, tanh, z, derivative)
    return z


def dgelu_(g: Tensor, derivative: Tensor) -> Tensor:
    """g * gelu', written over g [..., D]; `derivative` as `gelu_` filled it. No autograd."""
    if derivative.shape != g.shape:
        raise ValueError(f"derivative must have the shape of g, {list(g.shape)}; got {list(derivative.shape)}")
    if use_native("linear_gelu", g):
        torch.ops.fastnull.dgelu_(rows_out(g, "g"), derivative)
    else:
        _dgelu_ref(g, derivative)
    return g


def _in_one_op(x: Tensor, weight: Tensor) -> bool:
    """Whether product and pass are one op, which one kernel may do: not on a CPU."""
    return x.device.type != "cpu" and use_native("linear_gelu", x, weight)


def _matrix(x: Tensor) -> Tensor:
    """x [..., D] as [M, D]."""
    return x.reshape(-1, x.shape[-1])


def _room(x: Tensor, width: int, out: Tensor | None) -> Tensor:
    """Where the product of x [..., K] with a weight goes, [..., width]: `out`, or memory of our own."""
    shape = (*x.shape[:-1], width)
    if out is None:
        return empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape:
        raise ValueError(f"out must have shape {list(shape)}; got {list(out.shape)}")
    return out


def _matmul(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """x [..., K] @ weight [K, D] into our own memory (or `out`): [..., D]."""
    out = _room(x, weight.shape[1], out)
    torch.mm(_matrix(x), weight, out=out.view(-1, weight.shape[1]))
    return out


def linear_gelu_derivative(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    approximate: str = "none",
    *,
    out: Tensor | None = None,
    derivative: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = gelu(x W^T + b) and gelu' of it; no autograd.

    Args:
        x: [..., K].
        weight: [D, K] in x.dtype, any strides.
        bias: [D] in any dtype, or None.
        approximate: "none" (erf) or "tanh".
        out: [..., D] dense, to write h into.
        derivative: [..., D] dense, of `derivative_dtype(x.dtype)` or uint8, to write gelu' into.

    Returns:
        h [..., D] in x.dtype; gelu' [..., D]: float32 (float64) for float32 (float64), one-byte codes for bfloat16.
    """
    if _in_one_op(x, weight):
        check_choice("approximate", approximate, ("none", "tanh"))
        h = _room(x, weight.shape[0], out)
        if derivative is None:
            derivative = empty(h.shape, dtype=derivative_dtype(h.dtype), device=h.device)
        bias = None if bias is None else bias.contiguous()
        outputs = (h.view(-1, len(weight)), derivative.view(-1, len(weight)))
        torch.ops.fastnull.linear_gelu_out(_matrix(x), weight, bias, approximate == "tanh", *outputs)
        return h, derivative
    z = _matmul(x, weight.t(), out)
    if derivative is None:
        derivative = empty(z.shape, dtype=derivative_dtype(z.dtype), device=z.device)
    return gelu_(z, bias, approximate, derivative=derivative), derivative


def linear_dgelu(dy: Tensor, weight: Tensor, derivative: Tensor, *, out: Tensor | None = None) -> Tensor:
    """dz = (dy W) * gelu': the gradient before the GELU that feeds the linear W; no autograd.

    Args:
        dy: [..., K], gradient at the output of the linear after the GELU.
        weight: [K, D] of that linear, in dy.dtype, any strides.
        derivative: [..., D] as `linear_gelu_derivative` gave it.
        out: [..., D] dense, to write into.

    Returns:
        [..., D] in dy.dtype.
    """
    if _in_one_op(dy, weight):
        dz = _room(dy, weight.shape[1], out)
        width = weight.shape[1]
        torch.ops.fastnull.linear_dgelu_out(_matrix(dy), weight, derivative.view(-1, width), dz.view(-1, width))
        return dz
    return dgelu_(_matmul(dy, weight, out), derivative)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        h, derivative = linear_gelu_derivative(x, weight, bias, approximate)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, derivative)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, derivative = ctx.saved_tensors
        dz = dgelu_(dh.clone(memory_format=torch.contiguous_format), derivative)
        dx = dz @ weight if ctx.needs_input_grad[0] else None
        dweight = dz.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        dbias = dz.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x W^T + b) [..., D], differentiable, keeping the derivative instead of z; see `linear_gelu_derivative`."""
    if needs_grad(x, weight, bias):
        return _LinearGelu.apply(x, weight, bias, approximate)
    return gelu_(_matmul(x, weight.t(), None), bias, approximate)
