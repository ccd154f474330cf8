"""The last block where the head reads the class token alone: keys and values are never formed.

With x̂ the normalised tokens [B, N, D] and W_Q, W_K, W_V the folded weights of head h, only row 0 has a query:
    q = W_Q x̂₀ + b_Q    A = W_Kᵀ q    S = A x̂ᵀ    P = softmax(S)    Y = P x̂    o = W_V Y + b_V        (b_K cancels)
and the projection, the MLP and the residual use that row alone. Backward, from do:
    C = W_Vᵀ do    dP = C x̂ᵀ    dS = P (dP − Σ P dP)    dx̂ = dSᵀ A + Pᵀ C    dA = dS x̂    dx̂₀ += W_Qᵀ W_K dA
It replaces the four products over all tokens by products over B rows and costs a few passes over x̂. The row is float32
(float64 for float64), whatever the dtype of the other blocks. So is x̂ on a CPU; on a GPU it keeps the dtype of the
other blocks, and the products over it are 16-bit ones with float32 sums: exact float32 products would run on the plain
cores, and move twice the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.encoder.explicit.folded import FoldedLinear
from fastnull.ops import layer_norm_dx, layer_norm_stats, linear_dgelu, linear_gelu_derivative
from fastnull.vit.parts import BlockParts


class ClassTokenBlock:
    """The last block, from all tokens to the class token alone; needs a block without q_norm and k_norm."""

    def __init__(self, parts: BlockParts, dtype: torch.dtype) -> None:
        self.parts = parts
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32  # of the row
        self.tokens = dtype if parts.qkv.weight.device.type == "cuda" else self.dtype  # of x̂
        self.heads = parts.heads
        self.qkv, self.proj = FoldedLinear(parts.qkv, self.dtype), FoldedLinear(parts.proj, self.dtype)
        self.fc1, self.fc2 = FoldedLinear(parts.fc1, self.dtype), FoldedLinear(parts.fc2, self.dtype)
        self.shift = torch.zeros(parts.qkv.in_features, dtype=self.dtype, device=parts.qkv.weight.device)
        self._kept: tuple[Tensor, ...] = ()

    def linears(self) -> list[FoldedLinear]:
        """The four linears, in order."""
        return [self.qkv, self.proj, self.fc1, self.fc2]

    def sync(self, shift: Tensor) -> Tensor:
        """Take over the current weights, in place; `shift` as in `Block.sync`, but nothing is left out here."""
        inner = self.parts.proj.in_features
        rows = torch.ones_like(self.parts.qkv.weight[:, 0])
        rows[:inner] = self.parts.scale
        self.shift.copy_(shift)
        self.qkv.sync(before=self.parts.norm1, rows=rows)
        self.proj.sync(rows=self.parts.gamma1)
        self.fc1.sync(before=self.parts.norm2)
        self.fc2.sync(rows=self.parts.gamma2)
        return torch.zeros_like(shift)

    def forward(self, stream: Tensor) -> Tensor:
        """The stream [B, N, D] → the class token after the block [B, D]; keeps what `backward` needs."""
        x = stream.to(self.tokens)
        B = len(x)
        w_q, w_k, w_v = self._projections()
        b_q, _, b_v = self.qkv.bias.view(3, self.heads, 1, -1)
        normed, _, rstd = layer_norm_stats(x, eps=self.parts.norm1.eps, shift=self.shift)  # [B, N, D]
        q = normed[:, 0].to(self.dtype) @ w_q.transpose(1, 2) + b_q  # [H, B, d]
        a = (q @ w_k).transpose(0, 1).to(self.tokens)  # [B, H, D]
        p = torch.softmax(self._over_tokens(a, normed.transpose(1, 2)), dim=-1)  # [B, H, N]
        y = self._over_tokens(p, normed).transpose(0, 1)  # [H, B, D]
        o = (y @ w_v.transpose(1, 2) + b_v).permute(1, 0, 2).reshape(B, -1)  # [B, H·d]
        middle = x[:, 0] + self.shift + self.proj(o)
        normed2, _, rstd2 = layer_norm_stats(middle, eps=self.parts.norm2.eps)
        h, derivative = linear_gelu_derivative(normed2, self.fc1.weight, self.fc1.bias, self.parts.gelu)
        self._kept = (normed, rstd, a, p, normed2, rstd2, derivative)
        return middle + self.fc2(h)

    def backward(self, gradient: Tensor, out: Tensor) -> None:
        """Gradient of the class token after the block [B, D] → of the stream before it, into out [B, N, D]."""
        normed, rstd, a, p, normed2, rstd2, derivative = self._kept
        self._kept = ()
        B = len(normed)
        w_q, w_k, w_v = self._projections()
        dz = linear_dgelu(gradient, self.fc2.weight, derivative)
        dmiddle = layer_norm_dx(self.fc1.input_gradient(dz), normed2, None, rstd2, gradient)  # [B, D]
        do = self.proj.input_gradient(dmiddle).view(B, self.heads, -1).transpose(0, 1)  # [H, B, d]
        c = (do @ w_v).transpose(0, 1).to(self.tokens)  # [B, H, D]
        dp = self._over_tokens(c, normed.transpose(1, 2))  # [B, H, N]
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        da = self._over_tokens(ds, normed).transpose(0, 1)  # [H, B, D]
        p, ds = p.to(self.tokens), ds.to(self.tokens)
        dnormed = out if out.dtype == self.tokens else torch.empty_like(normed)
        torch.bmm(ds.transpose(1, 2), a, out=dnormed).baddbmm_(p.transpose(1, 2), c)  # [B, N, D]
        dnormed[:, 0] += (da @ w_k.transpose(1, 2) @ w_q).sum(0)
        layer_norm_dx(dnormed, normed, None, rstd, out=dnormed)
        dnormed[:, 0] += dmiddle
        if dnormed is not out:
            out.copy_(dnormed)

    def _over_tokens(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """rows [B, H, ·] @ tokens [B, ·, ·] with the operands in x̂'s dtype, and sums and result in the row's."""
        rows = rows.to(self.tokens)
        if self.tokens == self.dtype:
            return rows @ tokens
        if rows.is_cuda:
            return torch.bmm(rows, tokens, out_dtype=self.dtype)
        return rows.to(self.dtype) @ tokens.to(self.dtype)  # the CPU's products have no such form: the same numbers

    def _projections(self) -> Tensor:
        """W_Q, W_K, W_V as [3, H, d, D]."""
        return self.qkv.weight.view(3, self.heads, -1, self.qkv.weight.shape[1])
