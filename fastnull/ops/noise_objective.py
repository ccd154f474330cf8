"""Distance of noisy logits to the clean ones, its gradient, and the influence, in one pass.

    delta     = noisy - clean                                                                       [B, K]
    l2:         loss = ||delta||,    d loss / d noisy = delta / ||delta||, and 0 where delta = 0
    l2_squared: loss = ||delta||^2,  d loss / d noisy = 2 delta
    influence = sum_k (softmax(clean)_k - softmax(noisy)_k)^2                                       [B]

The gradient is an output, without a graph: the cotangent of the encoder's backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastnull.checks import check_choice
from fastnull.ops.common import check_positive, compute_dtype, define, empty, use_native

KINDS = ("l2", "l2_squared")
REDUCTIONS = ("mean", "none")


class NoiseObjective(NamedTuple):
    """Result of `noise_objective`, in float64 for float64 logits and float32 otherwise."""

    loss: Tensor
    """[B], per image."""
    cotangent: Tensor
    """[B, K], gradient with respect to the noisy logits."""
    influence: Tensor
    """[B], per image."""
    mean_loss: Tensor
    """[groups], mean over the images of a noise."""
    mean_influence: Tensor
    """[groups], influence of a noise."""


def noise_objective_ref(clean: Tensor, noisy: Tensor, kind: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """loss [B], scale * d loss / d noisy [B, K] and influence [B] in plain torch."""
    wide = compute_dtype(torch.promote_types(clean.dtype, noisy.dtype))
    clean, noisy = clean.to(wide), noisy.to(wide)
    clean = clean.repeat(noisy.shape[0] // max(clean.shape[0], 1), 1)
    delta = noisy - clean
    squared = delta.square().sum(1)
    if kind == "l2_squared":
        loss, factor = squared, torch.full_like(squared, 2 * scale)
    else:
        loss = squared.sqrt()
        factor = torch.where(loss == 0, 0.0, scale / loss)
    influence = (torch.softmax(clean, 1) - torch.softmax(noisy, 1)).square().sum(1)
    return loss, delta * factor.unsqueeze(1), influence


def _noise_objective_out_ref(
    clean: Tensor, noisy: Tensor, squared: bool, scale: float, loss: Tensor, cotangent: Tensor, influence: Tensor
) -> None:
    results = noise_objective_ref(clean, noisy, "l2_squared" if squared else "l2", scale)
    for out, result in zip((loss, cotangent, influence), results, strict=True):
        out.copy_(result)


define(
    "noise_objective_out(Tensor clean, Tensor noisy, bool squared, float scale, Tensor(a!) loss, Tensor(b!) cotangent,"
    " Tensor(c!) influence) -> ()",
    _noise_objective_out_ref,
)


def means_after(
    rows: Callable[..., None], clean: Tensor, noisy: Tensor, squared: bool, scale: float, *outputs: Tensor
) -> None:
    """`noise_objective_means_out` by `rows`, then two launches of torch.mean."""
    loss, cotangent, influence, mean_loss, mean_influence = outputs
    rows(clean, noisy, squared, scale, loss, cotangent, influence)
    for each, mean in ((loss, mean_loss), (influence, mean_influence)):
        torch.mean(each.view(len(mean), -1), 1, out=mean)


# Rows and means in one launch if there is such a kernel (csrc/cuda); otherwise rows, then means.
define(
    "noise_objective_means_out(Tensor clean, Tensor noisy, bool squared, float scale, Tensor(a!) loss, Tensor(b!)"
    " cotangent, Tensor(c!) influence, Tensor(d!) mean_loss, Tensor(e!) mean_influence) -> ()",
    functools.partial(means_after, torch.ops.fastnull.noise_objective_out),
)


def _objective_fwd(clean: Tensor, noisy: Tensor, kind: str, scale: float, groups: int) -> tuple[Tensor, ...]:
    """loss [B], cotangent [B, K], influence [B], and the means of loss and influence [groups]."""
    dtype = compute_dtype(torch.promote_types(clean.dtype, noisy.dtype))
    B, K = noisy.shape
    shapes = [(B,), (B, K), (B,), (groups,), (groups,)]
    outputs = tuple(empty(shape, dtype=dtype, device=noisy.device) for shape in shapes)
    arguments = (kind == "l2_squared", scale, *outputs)
    if use_native("noise_objective", clean, noisy):
        clean = clean if clean.stride(1) == 1 else clean.contiguous()
        noisy = noisy if noisy.stride(1) == 1 else noisy.contiguous()
        torch.ops.fastnull.noise_objective_means_out(clean, noisy, *arguments)
    else:
        means_after(_noise_objective_out_ref, clean, noisy, *arguments)
    return outputs


def _check(clean_logits: Tensor, noisy_logits: Tensor, kind: str, groups: int) -> None:
    check_choice("kind", kind, KINDS)
    clean, noisy = list(clean_logits.shape), list(noisy_logits.shape)
    if len(clean) != 2 or len(noisy) != 2 or clean[1] != noisy[1]:
        raise ValueError(f"clean_logits and noisy_logits must have shape [B, K]; got {clean} and {noisy}")
    if noisy[0] and (clean[0] == 0 or noisy[0] % clean[0]):
        raise ValueError(f"the rows of noisy_logits must be a multiple of those of clean_logits; got {noisy}, {clean}")
    check_positive("groups", groups)
    if noisy[0] % groups:
        raise ValueError(f"groups must divide the {noisy[0]} rows of noisy_logits; got {groups}")


def noise_objective(
    clean_logits: Tensor,
    noisy_logits: Tensor,
    kind: str = "l2",
    *,
    reduction: str = "mean",
    groups: int = 1,
    batch: int | None = None,
) -> NoiseObjective:
    """Loss, its gradient with respect to the noisy logits, and influence; no autograd.

    Args:
        clean_logits: [B, K]; or [B0, K] with B a multiple of B0 for several noises over the same images: noisy row i
            then belongs to clean row i % B0.
        noisy_logits: [B, K]; either may be float32, bfloat16 or float64.
        kind: "l2" (the norm of the difference) or "l2_squared".
        reduction: the cotangent is the gradient of the "mean" of the losses of a group, or with "none" of each loss.
        groups: number of noises; each has B / groups consecutive rows.
        batch: number of images in the cotangent's mean, if these rows are part of a larger batch.

    Returns:
        A `NoiseObjective`, without a host sync.
    """
    _check(clean_logits, noisy_logits, kind, groups)
    check_choice("reduction", reduction, REDUCTIONS)
    if batch is not None:
        check_positive("batch", batch)
    rows = noisy_logits.shape[0] // groups
    scale = 1.0 / (batch or rows) if reduction == "mean" and rows else 1.0
    return NoiseObjective(*_objective_fwd(clean_logits.detach(), noisy_logits.detach(), kind, scale, groups))
