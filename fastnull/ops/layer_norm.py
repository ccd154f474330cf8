"""LayerNorm over the last dimension, and its input gradient fused with the residual's gradient.

    x'   = x + shift                                      (shift [D]: biases that were not added to the residual stream)
    mean = sum(x') / D;  rstd = 1 / sqrt(sum((x' - mean)^2) / D + eps);  xhat = (x' - mean) * rstd
    y    = xhat * weight + bias                           (weight and bias may be folded into the next linear)
    dx   = dres + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))

Statistics are float32 whatever the dtype of x (float64 for float64). Saved for the backward is either x with mean and
rstd, or xhat with rstd: where there is no affine, xhat is y, which the next linear reads anyway, and x may be
overwritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnull.ops.common import compute_dtype, define, empty, needs_grad, rows, rows_out, use_native


def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm` and its statistics in plain torch: y in x.dtype; mean and rstd [...] in the compute dtype."""
    wide = x.to(compute_dtype(x.dtype))
    if shift is not None:
        wide = wide + shift
    mean = wide.mean(-1)
    centred = wide - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def layer_norm_dx_ref(
    dxhat: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dres: Tensor | None = None
) -> Tensor:
    """`layer_norm_dx` in plain torch."""
    wide = compute_dtype(x.dtype)
    g, r = dxhat.to(wide), rstd.unsqueeze(-1)
    xhat = x.to(wide) if mean is None else (x.to(wide) - mean.unsqueeze(-1)) * r
    dx = r * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return (dx if dres is None else dx + dres.to(wide)).to(x.dtype)


def _layer_norm_out_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    out, m, r = layer_norm_ref(x, weight, bias, eps, shift)
    y.copy_(out)
    if mean is not None:
        mean.copy_(m.view(mean.shape))
    rstd.copy_(r.view(rstd.shape))


def _layer_norm_dx_out_ref(
    dxhat: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dres: Tensor | None, dx: Tensor
) -> None:
    mean = None if mean is None else mean.view(x.shape[:-1])
    dx.copy_(layer_norm_dx_ref(dxhat, x, mean, rstd.view(x.shape[:-1]), dres))


def layer_norm_library(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    """`layer_norm_out` by torch's own operators: an addition, and a LayerNorm."""
    if shift is not None or weight is not None:
        x = x.to(compute_dtype(x.dtype))
    results = torch.native_layer_norm(x if shift is None else x + shift, x.shape[-1:], weight, bias, eps)
    for written, result in zip((y, mean, rstd), results, strict=True):
        if written is not None:
            written.copy_(result.view(written.shape))


def layer_norm_dx_library(
    dxhat: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dres: Tensor | None, dx: Tensor
) -> None:
    """`layer_norm_dx_out` by torch's own operators."""
    rstd = rstd.view(*x.shape[:-1], 1)
    stats = (torch.zeros_like(rstd), torch.ones_like(rstd)) if mean is None else (mean.view(rstd.shape), rstd)
    backward = torch.ops.aten.native_layer_norm_backward
    result = backward(dxhat, x, x.shape[-1:], *stats, None, None, [True, False, False])[0]
    if mean is None:  # x is normalised
        result = result * rstd
    if dres is None:
        dx.copy_(result)
    else:
        torch.add(result, dres, out=dx)


define(
    "layer_norm_out(Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, float eps, Tensor(a!) y, Tensor(b!)? mean, "
    "Tensor(c!) rstd) -> ()",
    _layer_norm_out_ref,
)
define(
    "layer_norm_dx_out(Tensor dxhat, Tensor x, Tensor? mean, Tensor rstd, Tensor? dres, Tensor(a!) dx) -> ()",
    _layer_norm_dx_out_ref,
)


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(torch.float32).contiguous()


def layer_norm_stats(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    out: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """LayerNorm of x + shift, x [..., D], together with its statistics; no autograd.

    Args:
        x: [..., D], float32, bfloat16 or float64. Strided inputs are read in place if the last dimension is dense and
            the leading ones flatten to two; otherwise they are copied.
        weight: [D] or None (1).
        bias: [D] or None (0).
        eps: added to the variance.
        shift: [D] or None (0): added to x in the compute dtype; nothing else sees the sum.
        out: (y, mean, rstd) to write into: y like x and with a dense last dimension; mean and rstd dense. mean may be
            None: it is not written.

    Returns:
        y [..., D] in x.dtype; mean and rstd [...] in float32 (float64 for float64), mean that of x + shift.
    """
    if not torch.compiler.is_compiling():
        for name, parameter in (("weight", weight), ("bias", bias), ("shift", shift)):
            if parameter is not None and parameter.shape != x.shape[-1:]:
                raise ValueError(f"{name} must have shape {list(x.shape[-1:])}; got {list(parameter.shape)}")
        if out is not None and out[0].shape != x.shape:
            raise ValueError(f"out[0] must have the shape of x, {list(x.shape)}; got {list(out[0].shape)}")
    mean: Tensor | None
    if out is None:
        wide = compute_dtype(x.dtype)
        y = empty(x.shape, dtype=x.dtype, device=x.device)
        mean = empty(x.shape[:-1], dtype=wide, device=x.device)
        rstd = empty(x.shape[:-1], dtype=wide, device=x.device)
    else:
        y, mean, rstd = out
    if use_native("layer_norm", x):
        parameters = (_wide(weight), _wide(bias), _wide(shift))
        torch.ops.fastnull.layer_norm_out(rows(x), *parameters, eps, rows_out(y, "out"), mean, rstd)
    else:
        _layer_norm_out_ref(x, weight, bias, shift, eps, y, mean, rstd)
    return y, mean, rstd


def layer_norm_dx(
    dxhat: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dres: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Input gradient of LayerNorm, plus the residual's gradient; no autograd.

    dx = dres + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)), xhat = (x - mean) * rstd.

    Args:
        dxhat: [..., D], gradient of the normalised row: dy * weight, or the input gradient of the linear into which
            the weight was folded.
        x: [..., D], the forward's input (with its shift); or, where mean is None, xhat.
        mean: [...], as `layer_norm_stats` gave it, or None.
        rstd: [...], as `layer_norm_stats` gave it.
        dres: [..., D], gradient that reaches x beside the norm (the residual path), or None.
        out: [..., D] to write into; may be the memory of `dres` or of `dxhat`.

    Returns:
        [..., D] in x.dtype. Saves nothing; in bfloat16 it moves 4 T (T = 2 * M * D bytes).
    """
    if not torch.compiler.is_compiling():
        for name, tensor in (("dxhat", dxhat), ("dres", dres), ("out", out)):
            if tensor is not None and tensor.shape != x.shape:
                raise ValueError(f"{name} must have the shape of x, {list(x.shape)}; got {list(tensor.shape)}")
    dx = empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    same_dtype = dxhat.dtype == x.dtype and dx.dtype == x.dtype and (dres is None or dres.dtype == x.dtype)
    if same_dtype and use_native("layer_norm", x, dxhat, dres):
        residual = None if dres is None else rows(dres)
        torch.ops.fastnull.layer_norm_dx_out(rows(dxhat), rows(x), mean, rstd, residual, rows_out(dx, "out"))
    else:
        _layer_norm_dx_out_ref(dxhat, x, mean, rstd, dres, dx)
    return dx


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = layer_norm_stats(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dxhat = dy if weight is None else (dy * weight).to(x.dtype)
            dx = layer_norm_dx(dxhat, x, mean, rstd)
        if ctx.needs_input_grad[1]:
            xhat = (x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
            dweight = (dy * xhat).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(0)
        return dx, dweight, dbias, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm of x [..., D] over its last dimension, differentiable; see `layer_norm_stats` for the arguments."""
    if needs_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps)
    return layer_norm_stats(x, weight, bias, eps)[0]
