"""A linear layer with the norm before it and the scales after it folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnull.encoder.explicit.products import PackedProduct
from fastnull.ops import dgelu_, gelu_, linear_dgelu, linear_gelu_derivative


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where the tensor is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class FoldedLinear:
    """A linear whose weight [out, in] and bias [out] are buffers that `sync` fills from live parameters.

    If `packed`, the weight is kept in the library's own order, once for each direction (see products.py). Such products
    allocate their results and ignore `out`: use what is returned.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, packed: bool = False) -> None:
        self._linear = linear
        self.weight = torch.empty_like(linear.weight, dtype=dtype, requires_grad=False)
        self.bias = torch.zeros(len(linear.weight), dtype=dtype, device=linear.weight.device)
        self._packed = packed
        self._product: PackedProduct | None = None
        self._transposed: PackedProduct | None = None

    def sync(self, *, before: nn.LayerNorm | None = None, rows: Tensor | None = None) -> Tensor:
        """Cast and fold: `before` is the norm whose affine goes in, `rows` [out] scales the output.

        Returns:
            The folded bias before its cast.
        """
        weight = wide(self._linear.weight)
        bias = wide(self._linear.bias) if self._linear.bias is not None else torch.zeros_like(weight[:, 0])
        if before is not None and before.bias is not None:
            bias = bias + weight @ wide(before.bias)
        if before is not None and before.weight is not None:
            weight = weight * wide(before.weight)
        if rows is not None:
            weight, bias = weight * wide(rows).unsqueeze(1), bias * wide(rows)
        self.bias.copy_(bias)
        if self._packed:
            cast = weight.to(self.bias.dtype)
            self._product, self._transposed = PackedProduct(cast), PackedProduct(cast.t())
            self.weight = cast.new_empty(0)
        else:
            self.weight.copy_(weight)
        return bias

    def tensors(self) -> list[Tensor]:
        """All tensors that it holds."""
        packed = [product.weight for product in (self._product, self._transposed) if product is not None]
        return [self.weight, self.bias, *packed]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, in] → [M, out]."""
        if self._product is not None:
            return self._product(x, self.bias)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)  # type: ignore[call-overload]

    def add_to(self, stream: Tensor, x: Tensor) -> None:
        """stream [M, out] += x W^T, in place and without the bias."""
        if self._product is not None:
            stream.copy_(self._product(x, None, stream))
        else:
            stream.addmm_(x, self.weight.t())

    def gelu(self, x: Tensor, approximate: str, *, out: Tensor, derivative: Tensor) -> Tensor:
        """gelu(linear(x)) [M, out] and, in `derivative`, GELU's derivative there."""
        if self._product is not None:
            return gelu_(self._product(x), self.bias, approximate, derivative=derivative)
        return linear_gelu_derivative(x, self.weight, self.bias, approximate, out=out, derivative=derivative)[0]

    def gelu_gradient(self, dy: Tensor, derivative: Tensor, *, out: Tensor) -> Tensor:
        """dy [M, out] → the gradient before the GELU that feeds this linear [M, in]."""
        if self._transposed is not None:
            return dgelu_(self._transposed(dy), derivative)
        return linear_dgelu(dy, self.weight, derivative, out=out)

    def input_gradient(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """dy [M, out] → dx [M, in]."""
        if self._transposed is not None:
            return self._transposed(dy)
        return torch.mm(dy, self.weight, out=out)  # type: ignore[call-overload]
