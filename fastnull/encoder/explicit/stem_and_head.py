"""The parts around the blocks, with their input gradients written out: patch embedding and positions before; norm,
pooling and classifier after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull.encoder.explicit.folded import FoldedLinear, wide
from fastnull.ops import layer_norm_dx, layer_norm_stats
from fastnull.vit.parts import ViTParts


class Norm:
    """A LayerNorm with its affine in buffers that `sync` fills. It keeps its input from forward to backward."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype, device: torch.device) -> None:
        self._norm = norm
        shape = norm.normalized_shape
        self._weight = torch.ones(shape, dtype=dtype, device=device)
        self._bias = torch.zeros(shape, dtype=dtype, device=device)
        self._kept: tuple[Tensor, Tensor | None, Tensor] | None = None

    def sync(self) -> None:
        """Take over the current affine, in place."""
        if self._norm.weight is not None:
            self._weight.copy_(self._norm.weight)
        if self._norm.bias is not None:
            self._bias.copy_(self._norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        x = x.contiguous()
        y, mean, rstd = layer_norm_stats(x, self._weight, self._bias, self._norm.eps)
        self._kept = (x, mean, rstd)
        return y

    def backward(self, dy: Tensor) -> Tensor:
        """Gradient of the output [..., D] → of the input."""
        assert self._kept is not None, "backward without forward"
        kept, self._kept = self._kept, None
        return layer_norm_dx((dy * self._weight).contiguous(), *kept)


class Stem:
    """Images → patch tokens → input of the first block. Normalisation of pixels is folded into the patch weights.

    The patch embedding is float32 (float64 for float64) and rounded once: with the mean folded in, its bias is larger
    than the tokens, and rounding the bias alone would shift all of them.
    """

    def __init__(self, parts: ViTParts, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> None:
        self._parts, self._mean, self._std = parts, mean, std
        self.dtype = dtype
        projection = parts.projection
        self.patch = (projection.kernel_size[0], projection.kernel_size[1])
        D = projection.out_channels
        device = projection.weight.device
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight = torch.empty(D, projection.weight[0].numel(), dtype=exact, device=device)  # [D, C·ph·pw]
        self.bias = torch.empty(D, dtype=exact, device=device)
        prefix, positions = (value.detach() for value in parts.positions())
        self.prefix = torch.empty_like(prefix, dtype=dtype)  # [P, D]
        self.positions = torch.empty_like(positions, dtype=dtype)  # [N, D]
        self._norm_pre = Norm(parts.norm_pre, dtype, device) if parts.norm_pre is not None else None

    @property
    def tokens(self) -> int:
        """P + N."""
        return len(self.prefix) + len(self.positions)

    def sync(self) -> None:
        """Take over the current weights, in place."""
        projection = self._parts.projection
        weight = wide(projection.weight)  # [D, C, ph, pw]
        bias = wide(projection.bias) if projection.bias is not None else torch.zeros_like(weight[:, 0, 0, 0])
        if self._mean is not None and self._std is not None:
            weight = weight / self._std.to(weight.dtype)
            bias = bias - (weight * self._mean.to(weight.dtype)).sum((1, 2, 3))
        self.weight.copy_(weight.flatten(1))
        self.bias.copy_(bias)
        prefix, positions = self._parts.positions()
        self.prefix.copy_(prefix)
        self.positions.copy_(positions)
        if self._norm_pre is not None:
            self._norm_pre.sync()

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → patch tokens [B, N, D]. As in the convolution, pixels after the last whole patch are
        dropped."""
        B, C, H, W = images.shape
        (ph, pw), images = self.patch, images.to(self.weight.dtype)
        gh, gw = H // ph, W // pw
        whole = images[:, :, : gh * ph, : gw * pw]
        cut = whole.reshape(B, C, gh, ph, gw, pw).permute(0, 2, 4, 1, 3, 5)  # [B, gh, gw, C, ph, pw]
        rows = cut.reshape(-1, self.weight.shape[1])  # one copy, [B·N, C·ph·pw]
        return torch.addmm(self.bias, rows, self.weight.t()).view(B, -1, len(self.weight)).to(self.dtype)

    def patches_gradient(self, gradient: Tensor, images: Tensor) -> Tensor:
        """Gradient of patch tokens [B, N, D] → of images [B, C, H, W]; 0 in the pixels that `patches` drops."""
        B, C, H, W = images.shape
        ph, pw = self.patch
        gh, gw = H // ph, W // pw
        rows = gradient.reshape(-1, len(self.weight)).to(self.weight.dtype) @ self.weight  # [B·N, C·ph·pw]
        cut = rows.to(self.dtype).view(B, gh, gw, C, ph, pw)
        whole = cut.permute(0, 3, 1, 4, 2, 5).reshape(B, C, gh * ph, gw * pw)
        # without a border, padding would be one more copy
        return whole if whole.shape == images.shape else F.pad(whole, (0, W - gw * pw, 0, H - gh * ph))

    def prepare(self, patches: Tensor, out: Tensor) -> None:
        """Patch tokens [B, N, D] → input of the first block, into out [B, P + N, D] of any dtype."""
        P = len(self.prefix)
        out[:, :P] = self.prefix
        torch.add(patches, self.positions, out=out[:, P:])
        if self._norm_pre is not None:
            out.copy_(self._norm_pre.forward(out.to(self.dtype, copy=True)))

    def prepare_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the first block's input [B, P + N, D] → of the patch tokens [B, N, D]."""
        if self._norm_pre is not None:
            gradient = self._norm_pre.backward(gradient)
        return gradient[:, len(self.prefix) :]


class Head:
    """Output of the last block → logits: norm, pooling, fc_norm, classifiers; in float32 (float64 for float64)."""

    def __init__(self, parts: ViTParts, dtype: torch.dtype) -> None:
        self._parts = parts
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.linears = [FoldedLinear(linear, self.dtype) for _, linear in parts.heads]
        # a slice: the device would have to be sent a list of indices, which a graph cannot hold
        first = parts.heads[0][0]
        self._tokens = slice(first, first + len(parts.heads))
        assert [token for token, _ in parts.heads] == list(range(first, first + len(parts.heads)))
        device = parts.projection.weight.device
        self._norm = Norm(parts.norm, self.dtype, device) if parts.norm is not None else None
        self._fc_norm = Norm(parts.fc_norm, self.dtype, device) if parts.fc_norm is not None else None

    @property
    def reads_class_token_alone(self) -> bool:
        """Whether the logits depend on token 0 only."""
        return self._parts.pool == "token" and self._tokens == slice(0, 1)

    def sync(self) -> None:
        """Take over the current weights, in place."""
        for part in (*self.linears, self._norm, self._fc_norm):
            if part is not None:
                part.sync()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x [B, P + N, D], or [B, 1, D] of the class token where that is all that is read → logits [B, K].

        `shift` [D] is added to x: the biases that the blocks left out of the stream.
        """
        pool, start = self._parts.pool, self._parts.pool_start
        read = {"token": x[:, self._tokens], "avg": x[:, start:], "token_avg": x}[pool] + shift  # [B, T, D]
        if self._norm is not None:
            read = self._norm.forward(read)
        if pool == "avg":
            self._pooled = read.shape[1]
            read = read.mean(1, keepdim=True)
        elif pool == "token_avg":
            read = torch.cat([read[:, :1], read[:, start:].mean(1, keepdim=True)], dim=2)  # [B, 1, 2 D]
        if self._fc_norm is not None:
            read = self._fc_norm.forward(read)  # [B, heads, D]
        logits = [linear(read[:, index]) for index, linear in enumerate(self.linears)]
        return torch.stack(logits).mean(0)

    def backward(self, cotangent: Tensor, out: Tensor) -> None:
        """Gradient of the logits [B, K] → of x, into out (shaped as x was)."""
        cotangent = cotangent.to(self.dtype) / len(self.linears)
        gradient = torch.stack([linear.input_gradient(cotangent) for linear in self.linears], dim=1)  # [B, heads, D]
        if self._fc_norm is not None:
            gradient = self._fc_norm.backward(gradient)
        pool, start = self._parts.pool, self._parts.pool_start
        if pool == "avg":
            gradient = (gradient / self._pooled).expand(-1, self._pooled, -1)
        elif pool == "token_avg":
            first, mean = gradient.chunk(2, dim=2)
            gradient = first.new_zeros(*out.shape)
            gradient[:, :1] = first
            gradient[:, start:] += mean / (out.shape[1] - start)
        if self._norm is not None:
            gradient = self._norm.backward(gradient)
        out.zero_()
        if pool == "token_avg":
            out.copy_(gradient)
        elif pool == "avg":
            out[:, start:] = gradient
        else:
            out[:, self._tokens] = gradient.to(out.dtype)
