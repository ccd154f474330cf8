"""A pre-norm ViT block with its forward and its input gradient written out; no autograd, no weight gradient.

Folded into the weights once per `sync`, in float32 before the cast:
    the affine of LayerNorm into the linear after it       W' = W diag(γ), b' = b + W β
    LayerScale into the linear before it                    W' = diag(γ) W, b' = γ b
    the scale of the scores into the rows of q (into the affine of q_norm where there is one)
so the norms here only normalise, and LayerNorm's backward starts from the input gradient of the next linear.

The residual stream is one buffer [M, D] for all blocks. proj and fc2 add their products to it in place. Their biases
never enter it: each norm adds the sum of all biases before it (`shift`) to what it reads, so no pass over the stream is
spent on them.

Kept for the backward, in units of B·N·D values: the normalised inputs of qkv and fc1 (2), packed q, k, v (3), the
derivative of GELU (4 in float32; the space of 2 in bfloat16, where it is an 8-bit code), and 1/std of both norms.

Two dtypes: what is kept has the encoder's dtype; the stream, products and everything between them have `compute`.
They are the same but for bfloat16 on processors whose bfloat16 products are slower than their float32 ones (see
products.py): there what is kept is bfloat16 and everything else float32. A batch is processed in parts of a few images,
so that what is not kept stays in the cache and takes little memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnull.encoder.explicit.folded import FoldedLinear
from fastnull.encoder.explicit.products import packs
from fastnull.ops import (
    attention,
    attention_dqkv,
    derivative_dtype,
    layer_norm_dx,
    layer_norm_stats,
)
from fastnull.vit.parts import BlockParts


class Saved:
    """What one block keeps for its backward, for up to a number of rows (tokens of all images)."""

    def __init__(self, rows: int, block: Block, new: Callable[..., Tensor]) -> None:
        self.normed1 = new(rows, block.width)
        self.normed2 = new(rows, block.width)
        self.qkv = new(rows, 3 * block.inner)
        self.derivative = new(rows, block.hidden, dtype=derivative_dtype(block.dtype))  # of GELU
        stat = torch.float64 if block.dtype == torch.float64 else torch.float32
        self.rstd = [new(rows, dtype=stat) for _ in range(2)]  # 1/std of norm1 and norm2


class Scratch:
    """Buffers that all blocks share, for the rows of one part of the batch."""

    def __init__(self, rows: int, block: Block, new: Callable[..., Tensor]) -> None:
        wide = {"dtype": block.compute}
        self.normed = new(rows, block.width, **wide)  # dx̂
        self.heads = new(rows, block.inner, **wide)  # attention output; in the backward its gradient
        self.hidden = new(rows * max(block.hidden, 3 * block.inner), **wide)  # gelu output; backward: dz, then dqkv
        # where what is kept has another dtype: its copy in `compute`
        mixed = block.compute != block.dtype
        self.kept = new(rows, block.width, **wide) if mixed else None  # of normed1 or normed2
        self.qkv = new(rows, 3 * block.inner, **wide) if mixed or block.qk_norm else None


class Block:
    """One block over preallocated memory. Rows are the tokens of a part of the batch, [m, D].

    Args:
        parts: the live modules.
        dtype: of what is kept for the backward.
        compute: of weights and of everything else; None is `dtype`.
    """

    def __init__(
        self,
        parts: BlockParts,
        dtype: torch.dtype,
        compute: torch.dtype | None = None,
    ) -> None:
        self.parts, self.dtype, self.compute = parts, dtype, compute or dtype
        self.width = parts.qkv.in_features
        self.inner = parts.proj.in_features  # H·d
        self.hidden = parts.fc1.out_features
        self.heads, self.head_dim = parts.heads, parts.proj.in_features // parts.heads
        self.qk_norm = parts.q_norm is not None or parts.k_norm is not None
        packed = packs(self.compute, parts.qkv.weight.device)
        self.qkv, self.proj, self.fc1, self.fc2 = (
            FoldedLinear(linear, self.compute, packed) for linear in (parts.qkv, parts.proj, parts.fc1, parts.fc2)
        )
        device = parts.qkv.weight.device
        # the sums of biases that norm1 and norm2 add to the stream, [D]
        stat = torch.float64 if dtype == torch.float64 else torch.float32
        self.shift1, self.shift2 = (torch.zeros(self.width, dtype=stat, device=device) for _ in range(2))
        # the affine that turns normalised q and k into what the scores take, [2, 1, d]: scale, shift
        self.qk_scale = torch.ones(2, 1, self.head_dim, dtype=self.compute, device=device)
        self.qk_shift = torch.zeros(2, 1, self.head_dim, dtype=self.compute, device=device)

    def linears(self) -> list[FoldedLinear]:
        """The four linears, in order."""
        return [self.qkv, self.proj, self.fc1, self.fc2]

    def sync(self, shift: Tensor) -> Tensor:
        """Take over the current weights, in place.

        Args:
            shift: [D], the sum of the biases that the blocks before this one left out of the stream.

        Returns:
            That sum with this block's biases.
        """
        parts = self.parts
        rows = torch.ones_like(parts.qkv.weight[:, 0])
        if not self.qk_norm:
            rows[: self.inner] = parts.scale
        self.shift1.copy_(shift)
        self.qkv.sync(before=parts.norm1, rows=rows)
        shift = shift + self.proj.sync(rows=parts.gamma1)
        self.shift2.copy_(shift)
        self.fc1.sync(before=parts.norm2)
        shift = shift + self.fc2.sync(rows=parts.gamma2)
        for index, norm in enumerate((parts.q_norm, parts.k_norm)):
            if norm is not None:
                self.qk_scale[index].copy_(norm.weight if norm.weight is not None else 1)
                self.qk_shift[index].copy_(norm.bias if norm.bias is not None else 0)
        if self.qk_norm:
            self.qk_scale[0].mul_(parts.scale)
            self.qk_shift[0].mul_(parts.scale)
        return shift

    def forward(self, saved: Saved, scratch: Scratch, rows: slice, images: int, stream: Tensor) -> None:
        """The stream [m, D] of a part of the batch with whole images → after the block, in place."""
        m = len(stream)
        heads, hidden = scratch.heads[:m], scratch.hidden[: m * self.hidden].view(m, -1)
        normed = _room(saved.normed1[rows], scratch.kept)
        out = (normed, None, saved.rstd[0][rows])
        layer_norm_stats(stream, eps=self.parts.norm1.eps, shift=self.shift1, out=out)
        _keep(normed, saved.normed1[rows])
        qkv = self.qkv(normed, out=_room(saved.qkv[rows], scratch.qkv))
        _keep(qkv, saved.qkv[rows])
        self._qk_normed(self._packed(qkv, images))
        attention(self._packed(qkv, images), 1.0, out=heads.view(images, -1, self.heads, self.head_dim))
        self.proj.add_to(stream, heads)
        normed = _room(saved.normed2[rows], scratch.kept)
        out = (normed, None, saved.rstd[1][rows])
        layer_norm_stats(stream, eps=self.parts.norm2.eps, shift=self.shift2, out=out)
        _keep(normed, saved.normed2[rows])
        hidden = self.fc1.gelu(normed, self.parts.gelu, out=hidden, derivative=saved.derivative[rows])
        self.fc2.add_to(stream, hidden)

    def backward(self, saved: Saved, scratch: Scratch, rows: slice, images: int, gradient: Tensor) -> None:
        """Gradient of the rows of the block's output [m, D], in `compute` → of its input, in place."""
        m = len(gradient)
        dnormed, heads = scratch.normed[:m], scratch.heads[:m]
        dz = scratch.hidden[: m * self.hidden].view(m, -1)
        dz = self.fc2.gelu_gradient(gradient, saved.derivative[rows], out=dz)
        dnormed = self.fc1.input_gradient(dz, out=dnormed)
        normed = _widened(saved.normed2[rows], scratch.kept)
        layer_norm_dx(dnormed, normed, None, saved.rstd[1][rows], gradient, out=gradient)
        heads = self.proj.input_gradient(gradient, out=heads)
        dqkv = self._packed(scratch.hidden[: m * 3 * self.inner].view(m, -1), images)
        dheads = heads.view(images, -1, self.heads, self.head_dim)
        qkv = self._packed(_widened(saved.qkv[rows], scratch.qkv), images)
        stats = self._qk_normed(qkv)
        attention_dqkv(qkv, dheads, 1.0, out=dqkv)
        self._qk_norm_backward(self._packed(saved.qkv[rows], images), stats, dqkv)
        dnormed = self.qkv.input_gradient(dqkv.view(m, -1), out=dnormed)
        normed = _widened(saved.normed1[rows], scratch.kept)
        layer_norm_dx(dnormed, normed, None, saved.rstd[0][rows], gradient, out=gradient)

    def _packed(self, rows: Tensor, images: int) -> Tensor:
        """[m, 3·H·d] → [B, N, 3, H, d]."""
        return rows.view(images, -1, 3, self.heads, self.head_dim)

    def _qk_normed(self, qkv: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """Normalise q and k [B, N, 3, H, d] in place where the model does; mean and 1/std of each that it did."""
        stats = []
        for index, norm in enumerate((self.parts.q_norm, self.parts.k_norm)):
            if norm is not None:
                normed, mean, rstd = layer_norm_stats(qkv[:, :, index].contiguous(), eps=norm.eps)
                qkv[:, :, index] = normed
                stats.append((mean, rstd))
        if self.qk_norm:
            qkv[:, :, :2].mul_(self.qk_scale).add_(self.qk_shift)
        return stats

    def _qk_norm_backward(self, raw: Tensor, stats: list[tuple[Tensor | None, Tensor]], dqkv: Tensor) -> None:
        """Take the gradient of normalised q and k in dqkv [B, N, 3, H, d] back to the raw ones, in place."""
        if self.qk_norm:
            dqkv[:, :, :2].mul_(self.qk_scale)
        normed = [index for index, norm in enumerate((self.parts.q_norm, self.parts.k_norm)) if norm is not None]
        for index, (mean, rstd) in zip(normed, stats, strict=True):
            x = raw[:, :, index].to(self.compute, memory_format=torch.contiguous_format)
            dqkv[:, :, index] = layer_norm_dx(dqkv[:, :, index].contiguous(), x, mean, rstd)


def _room(kept: Tensor, scratch: Tensor | None) -> Tensor:
    """Where to compute what will be kept: in its place, or in scratch memory where that has the compute dtype."""
    return kept if scratch is None else scratch[: len(kept)]


def _keep(computed: Tensor, kept: Tensor) -> None:
    if computed.data_ptr() != kept.data_ptr():
        kept.copy_(computed)


def _widened(kept: Tensor, scratch: Tensor | None) -> Tensor:
    """What was kept, in the compute dtype and free to be written where that is scratch memory."""
    return kept if scratch is None else scratch[: len(kept)].copy_(kept)
