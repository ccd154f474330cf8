"""Self-attention over short sequences from packed qkv, and its backward into packed dqkv.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]                                   (views [B, N, H, d])
    S = scale q k^T;  P = softmax(S);  o = P v                                           (each image and head)
    dv = P^T do;  dP = do v^T;  dS = P * (dP - rowsum(P * dP));  dq = scale dS k;  dk = scale dS^T q

Only qkv is saved for the backward, which recomputes S and P (one product more than the other four).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnull.ops.common import compute_dtype, define, empty, needs_grad, use_native

WIDEST_HEAD = 128
"""Largest head dimension of the Triton kernels; wider heads on a GPU use torch's attention."""


def _heads(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3, H, d] → q, k, v [B, H, N, d] in the compute dtype."""
    wide = packed.to(compute_dtype(packed.dtype)).permute(2, 0, 3, 1, 4)
    return wide[0], wide[1], wide[2]


def attention_ref(qkv: Tensor, scale: float) -> Tensor:
    """`attention` in plain torch."""
    q, k, v = _heads(qkv)
    p = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)  # [B, H, N, N]
    return (p @ v).transpose(1, 2).to(qkv.dtype)


def attention_dqkv_ref(qkv: Tensor, grad_o: Tensor, scale: float) -> Tensor:
    """`attention_dqkv` in plain torch."""
    q, k, v = _heads(qkv)
    do = grad_o.to(q.dtype).transpose(1, 2)  # [B, H, N, d]
    p = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    dp = do @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    packed = torch.stack([ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do])  # [3, B, H, N, d]
    return packed.permute(1, 3, 0, 2, 4).to(qkv.dtype)


def attention_sdpa(qkv: Tensor, scale: float) -> Tensor:
    """`attention` by torch's operator; [B, N, H, d], a view."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def attention_dqkv_sdpa(qkv: Tensor, grad_o: Tensor, scale: float) -> Tensor:
    """`attention_dqkv` by torch's own operator under autograd: its forward once more, then its backward."""
    dqkv = torch.empty_like(qkv)
    attention_dqkv_sdpa_out(qkv, grad_o, scale, dqkv)
    return dqkv


def attention_out_sdpa(qkv: Tensor, scale: float, o: Tensor) -> None:
    """`attention_sdpa` into o [B, N, H, d]: torch gives its result in an order of its own."""
    o.copy_(attention_sdpa(qkv, scale))


def attention_dqkv_sdpa_out(qkv: Tensor, grad_o: Tensor, scale: float, dqkv: Tensor) -> None:
    """`attention_dqkv_sdpa` into dqkv [B, N, 3, H, d], each part by a copy."""
    with torch.inference_mode(False), torch.enable_grad():
        qkv = qkv.clone() if qkv.is_inference() else qkv.detach()  # the former cannot ask for a gradient
        leaves = [part.requires_grad_(True) for part in qkv.permute(2, 0, 3, 1, 4).unbind(0)]  # [B, H, N, d] each
        q, k, v = leaves
        o = F.scaled_dot_product_attention(q, k, v, scale=scale)
        parts = torch.autograd.grad(o, leaves, grad_o.transpose(1, 2))
    for written, part in zip(dqkv.permute(2, 0, 3, 1, 4), parts, strict=True):
        written.copy_(part)


def _attention_out_ref(qkv: Tensor, scale: float, o: Tensor) -> None:
    o.copy_(attention_ref(qkv, scale))


def _attention_dqkv_out_ref(qkv: Tensor, grad_o: Tensor, scale: float, dqkv: Tensor) -> None:
    dqkv.copy_(attention_dqkv_ref(qkv, grad_o, scale))


define("attention_out(Tensor qkv, float scale, Tensor(a!) o) -> ()", _attention_out_ref)
define("attention_dqkv_out(Tensor qkv, Tensor grad_o, float scale, Tensor(a!) dqkv) -> ()", _attention_dqkv_out_ref)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(qkv: Tensor, scale: float | None) -> float:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [B, N, 3, H, d]; got {list(qkv.shape)}")
    return qkv.shape[-1] ** -0.5 if scale is None else float(scale)


def _output(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if out is None:
        return empty(shape, dtype=like.dtype, device=like.device)
    if tuple(out.shape) != shape or out.dtype != like.dtype:
        raise ValueError(f"out must be {like.dtype} {list(shape)}; got {out.dtype} {list(out.shape)}")
    if out.stride(-1) != 1 and out.shape[-1] != 1:
        raise ValueError(f"the last dimension of out must be dense; its strides are {out.stride()}")
    return out


def _attention_fwd(qkv: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    B, N, _, H, d = qkv.shape
    o = _output(out, (B, N, H, d), qkv)
    if not use_native("attention", qkv):
        _attention_out_ref(qkv, scale, o)
    else:
        torch.ops.fastnull.attention_out(_dense_last(qkv), scale, o)
    return o


def attention_dqkv(qkv: Tensor, grad_o: Tensor, scale: float | None = None, *, out: Tensor | None = None) -> Tensor:
    """Gradient of `attention` with respect to the packed qkv; no autograd.

    Args:
        qkv: [B, N, 3, H, d], the forward's input; copied unless the last dimension is dense.
        grad_o: [B, N, H, d], gradient of the output, in qkv.dtype; strides likewise.
        scale: as for `attention`.
        out: [B, N, 3, H, d] to write into, last dimension dense; must not share memory with qkv or grad_o.

    Returns:
        dqkv [B, N, 3, H, d] in qkv.dtype.
    """
    scale = _check(qkv, scale)
    B, N, _, H, d = qkv.shape
    if tuple(grad_o.shape) != (B, N, H, d) or grad_o.dtype != qkv.dtype:
        raise ValueError(f"grad_o must be {qkv.dtype} {[B, N, H, d]}; got {grad_o.dtype} {list(grad_o.shape)}")
    dqkv = _output(out, tuple(qkv.shape), qkv)
    if not use_native("attention", qkv):
        _attention_dqkv_out_ref(qkv, grad_o, scale, dqkv)
    else:
        torch.ops.fastnull.attention_dqkv_out(_dense_last(qkv), _dense_last(grad_o), scale, dqkv)
    return dqkv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.scale = scale
        return _attention_fwd(qkv, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        return attention_dqkv(qkv, grad_o, ctx.scale), None


def attention(qkv: Tensor, scale: float | None = None, *, out: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v for every image and head, differentiable with respect to qkv.

    Args:
        qkv: [B, N, 3, H, d], float32, bfloat16 or float64: a view of the output of timm's qkv linear. Copied unless the
            last dimension is dense.
        scale: factor of the scores; None: d ** -0.5. Use 1.0 if it is folded into the weights.
        out: [B, N, H, d] to write into, last dimension dense; only without gradient.

    Returns:
        [B, N, H, d] in qkv.dtype; `.flatten(2)` is the input of the projection.
    """
    scale = _check(qkv, scale)
    if needs_grad(qkv):
        if out is not None:
            raise ValueError("out cannot be given if qkv requires a gradient")
        return _Attention.apply(qkv, scale)
    return _attention_fwd(qkv, scale, out)
