"""The input gradient of a linear that follows a LayerNorm, back through the norm, in one product.

    z = xhat W'^T + b',  xhat = (x - mean) rstd         (forward; gamma and beta of the norm are folded into W' and b')
    dxhat = dz W'                                                                                  [M, D]
    dx = dres + rstd (dxhat - c1 / D - xhat c2 / D),  c1 = sum_j dxhat_j,  c2 = sum_j dxhat_j xhat_j

Both row sums are known before the product, from what the kernel that makes dz holds anyway (ours):

    c1 = dz . s,  s_k = sum_j W'_kj        c2 = dz . (z - b')

so a product can finish the norm's backward in its epilogue, and dxhat is never written. That needs z: attention's
backward has q, k and v; the MLP keeps the derivative of GELU alone, so there is no such form of its first linear.

Not used by the encoder until it is measured to be faster than the product followed by `layer_norm_dx`. In 16 bits dz is
rounded before the sums and before the product alike, so c1 is that of the same dxhat; z is rounded for c2 alone, which
then errs by `eps |dz| |z|`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.ops.common import compute_dtype, define, empty, use_native


def linear_layer_norm_dx_ref(
    dz: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    c1: Tensor,
    c2: Tensor,
    dres: Tensor | None = None,
) -> Tensor:
    """`linear_layer_norm_dx` in plain torch."""
    wide = compute_dtype(x.dtype)
    dxhat = dz.to(wide) @ weight.to(wide)
    r, D = rstd.unsqueeze(-1), x.shape[-1]
    xhat = (x.to(wide) - mean.unsqueeze(-1)) * r
    dx = r * (dxhat - c1.unsqueeze(-1) / D - xhat * (c2.unsqueeze(-1) / D))
    return (dx if dres is None else dx + dres.to(wide)).to(x.dtype)


def _linear_layer_norm_dx_out_ref(
    dz: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    c1: Tensor,
    c2: Tensor,
    dres: Tensor | None,
    dx: Tensor,
) -> None:
    dx.copy_(linear_layer_norm_dx_ref(dz, weight, x, mean, rstd, c1, c2, dres))


define(
    "linear_layer_norm_dx_out(Tensor dz, Tensor weight, Tensor x, Tensor mean, Tensor rstd, Tensor c1, Tensor c2,"
    " Tensor? dres, Tensor(a!) dx) -> ()",
    _linear_layer_norm_dx_out_ref,
)


def layer_norm_sums(dz: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """c1 and c2 [M] of the module docstring, in float32 (float64 for float64).

    Args:
        dz: [M, K], gradient of the linear's output.
        z: [M, K], its output.
        weight, bias: [K, D] and [K], with the norm's affine folded in.
    """
    wide = compute_dtype(dz.dtype)
    dz = dz.to(wide)
    return dz @ weight.to(wide).sum(1), (dz * (z.to(wide) - bias.to(wide))).sum(1)


def linear_layer_norm_dx(
    dz: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    c1: Tensor,
    c2: Tensor,
    dres: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """dx of the module docstring; no autograd.

    Args:
        dz: [M, K], dense in K.
        weight: [K, D] with the norm's affine folded in, in dz.dtype, any strides.
        x: [M, D] dense, the norm's input.
        mean, rstd: [M], as `layer_norm_stats` gave them.
        c1, c2: [M], as `layer_norm_sums` gives them, in the dtype of mean.
        dres: [M, D] dense, gradient that reaches x beside the norm, or None.
        out: [M, D] dense to write into; may be the memory of `dres`.

    Returns:
        [M, D] in x.dtype.

    Raises:
        ValueError: shapes that do not fit; the message holds them.
    """
    (M, K), D = dz.shape, weight.shape[1]
    if weight.shape[0] != K or x.shape != (M, D):
        raise ValueError(f"dz {list(dz.shape)}, weight {list(weight.shape)} and x {list(x.shape)} do not fit")
    for name, tensor, shape in (("mean", mean, (M,)), ("rstd", rstd, (M,)), ("c1", c1, (M,)), ("c2", c2, (M,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}; got {list(tensor.shape)}")
    for name, other in (("dres", dres), ("out", out)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {list(x.shape)}; got {list(other.shape)}")
    dx = empty((M, D), dtype=x.dtype, device=x.device) if out is None else out
    # float32 products of the kernel would run on the plain cores: the library's are faster
    sixteen = dz.is_cuda and dz.dtype in (torch.bfloat16, torch.float16)
    if sixteen and use_native("linear_layer_norm_dx", dz, weight, x, dres, dx):
        torch.ops.fastnull.linear_layer_norm_dx_out(dz, weight, x, mean, rstd, c1, c2, dres, dx)
    else:
        _linear_layer_norm_dx_out_ref(dz, weight, x, mean, rstd, c1, c2, dres, dx)
    return dx
