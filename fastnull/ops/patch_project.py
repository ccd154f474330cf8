"""Projection of image noise onto the nullspace of a patch embedding, from and to NCHW.

    v = the patches of the noise as rows [B * gh * gw, C * p * p], in the order of the embedding's weight [D, C, p, p]
    P v = v Q Q^T           Q [C p^2, k]: orthonormal basis of the nullspace          (complement = False)
    P v = v - v R R^T       R [C p^2, r]: orthonormal basis of the row space          (complement = True)
    result = P v            or images + P v

The caller passes the smaller of the two bases. P is an orthogonal projector, so the backward is the op itself and saves
no activations. Kernels process patches in float32 panels of some hundred rows, without an unfolded copy of the images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnull.ops.common import check_positive, compute_dtype, define, empty, needs_grad, no_autocast, use_native


def _unfold(images: Tensor, p: int) -> Tensor:
    """[B, C, H, W] → [B * gh * gw, C * p * p]."""
    B, C, H, W = images.shape
    return images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, C * p * p)


def _fold(rows: Tensor, shape: torch.Size, p: int) -> Tensor:
    """[B * gh * gw, C * p * p] → [B, C, H, W]."""
    B, C, H, W = shape
    return rows.reshape(B, H // p, W // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def patch_project_ref(
    noise: Tensor, basis: Tensor, patch_size: int, complement: bool, images: Tensor | None = None
) -> Tensor:
    """`patch_project` in plain torch."""
    wide = compute_dtype(noise.dtype)
    v, basis = _unfold(noise.to(wide), patch_size), basis.to(wide)
    with no_autocast(noise.device):  # 16-bit products are too inexact
        part = (v @ basis) @ basis.t()
    result = _fold(v - part if complement else part, noise.shape, patch_size)
    return (result if images is None else result + images.to(wide)).to(noise.dtype)


def _patch_project_out_ref(
    noise: Tensor, basis: Tensor, patch_size: int, complement: bool, images: Tensor | None, out: Tensor
) -> None:
    out.copy_(patch_project_ref(noise, basis, patch_size, complement, images))


define(
    "patch_project_out(Tensor noise, Tensor basis, int patch_size, bool complement, Tensor? images, Tensor(a!) out)"
    " -> ()",
    _patch_project_out_ref,
)


def _project(
    noise: Tensor, basis: Tensor, patch_size: int, complement: bool, images: Tensor | None, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = empty(noise.shape, dtype=noise.dtype, device=noise.device)
    if (images is None or images.dtype == noise.dtype) and use_native("patch_project", noise):
        wide_basis = basis.to(torch.float32).contiguous()
        torch.ops.fastnull.patch_project_out(noise, wide_basis, patch_size, complement, images, out)
    else:
        _patch_project_out_ref(noise, basis, patch_size, complement, images, out)
    return out


class _PatchProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, noise: Tensor, basis: Tensor, patch_size: int, complement: bool, images: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.patch_size, ctx.complement = patch_size, complement
        return _project(noise, basis, patch_size, complement, images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        (basis,) = ctx.saved_tensors
        dnoise = _project(grad, basis, ctx.patch_size, ctx.complement, None) if ctx.needs_input_grad[0] else None
        return dnoise, None, None, None, grad if ctx.needs_input_grad[4] else None


def patch_project(
    noise: Tensor,
    basis: Tensor,
    patch_size: int,
    complement: bool,
    images: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Project image noise onto the nullspace of a patch embedding, and add it to images if given; differentiable.

    Args:
        noise: [B, C, H, W], float32, bfloat16 or float64, any strides; H and W multiples of patch_size.
        basis: [C * p * p, n], orthonormal columns (rows in the order channel, row, column, as in the embedding's
            weight) of the nullspace, or of the row space if `complement`. Computed in float32 (float64 for float64).
        patch_size: p, in pixels.
        complement: True returns noise minus its projection on the basis; False returns the projection.
        images: [B, C, H, W] to add to the result.
        out: [B, C, H, W] to write into; may be noise or images. Only without gradient.

    Returns:
        [B, C, H, W] in noise.dtype. In bfloat16 the rounding of the result limits its exactness.

    Raises:
        TypeError: patch_size is not an integer.
        ValueError: wrong shapes, or patch_size < 1.
    """
    check_positive("patch_size", patch_size)
    if not torch.compiler.is_compiling():
        if noise.ndim != 4 or noise.shape[2] % patch_size or noise.shape[3] % patch_size:
            raise ValueError(
                f"noise must have shape [B, C, H, W], H and W multiples of {patch_size}; got {list(noise.shape)}"
            )
        rows = noise.shape[1] * patch_size**2
        if basis.ndim != 2 or basis.shape[0] != rows:
            raise ValueError(f"basis must have shape [{rows}, n] (C * patch_size ** 2); got {list(basis.shape)}")
        for name, other in (("images", images), ("out", out)):
            if other is not None and other.shape != noise.shape:
                raise ValueError(f"{name} must have the shape of noise, {list(noise.shape)}; got {list(other.shape)}")
    if needs_grad(noise, images):
        if out is not None:
            raise ValueError("out cannot be given if noise or images require a gradient")
        return _PatchProject.apply(noise, basis, patch_size, complement, images)
    return _project(noise, basis, patch_size, complement, images, out)
