"""The linears of an MLP in eight bits: products of float8_e4m3fn with a scale a row, on Hopper and later.

    forward         y  = (x_q W_qᵀ) · s_x s_W           W  [out, in] quantised by rows once a `sync`
    input gradient  dx = (dy_q V_q ᵀ) · s_dy s_V         V = Wᵀ [in, out], quantised by rows of its own

Both products contract the dense last dimension of both operands, the only order that Hopper's 8-bit tensor cores take:
so the weight is kept twice, in as many bytes as once in bfloat16. Activations and gradients are quantised in each step,
in one pass (fastnull.ops.quantize_rows). Sums are float32 (Hopper's fast accumulation), results 16-bit.

On a CPU the same products are torch's own, in float32 on the rounded values: as exact, and slow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull.encoder.explicit.folded import FoldedLinear
from fastnull.ops.quantize_rows import FLOAT8, quantize_rows

OLDEST_GPU = (9, 0)
MULTIPLE = 16
"""Sizes that the library's 8-bit products take are multiples of it."""


def check_float8(mlp_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError where an encoder of this dtype on this device cannot have the MLP's products in `mlp_dtype`."""
    if mlp_dtype != FLOAT8:
        raise ValueError(f"mlp_dtype must be None or torch.float8_e4m3fn; got {mlp_dtype}")
    if dtype != torch.bfloat16:
        raise ValueError(f"mlp_dtype=torch.float8_e4m3fn needs a bfloat16 encoder (dtype=torch.bfloat16); got {dtype}")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            have, need = (f"sm_{major}{minor}" for major, minor in (capability, OLDEST_GPU))
            raise ValueError(
                f"mlp_dtype=torch.float8_e4m3fn needs a GPU of at least {need} (Hopper); this one is {have}"
            )
    try:
        one = torch.ones(MULTIPLE, MULTIPLE, dtype=dtype, device=device)
        product(*quantize_rows(one), *quantize_rows(one), dtype)
    except RuntimeError as failure:  # as on the CPU of torch 2.11
        first = str(failure).splitlines()[0]
        raise ValueError(
            f"mlp_dtype={mlp_dtype}: torch {torch.__version__} has no 8-bit products on {device} ({first})"
        ) from failure


def product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """(a · a_scale) (b · b_scale)ᵀ + bias: a [M, K] and b [N, K] in float8, scales [M, 1] and [N, 1] → [M, N]."""
    by_rows = F.ScalingType.RowWise
    return F.scaled_mm(
        a, b.t(), a_scale, by_rows, b_scale.t(), by_rows, bias=bias, output_dtype=dtype, use_fast_accum=True
    )


class Float8Linear(FoldedLinear):
    """A folded linear whose products are 8-bit ones. Results come in memory of their own, `out` is room that is unused.

    Raises:
        ValueError: a size that the products do not take.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        rows, columns = linear.weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            raise ValueError(
                f"mlp_dtype=torch.float8_e4m3fn needs MLP widths that are multiples of {MULTIPLE}; "
                f"a linear has {columns} inputs and {rows} outputs"
            )
        device = linear.weight.device
        self.weight = torch.empty(rows, columns, dtype=FLOAT8, device=device)
        self.turned = torch.empty(columns, rows, dtype=FLOAT8, device=device)
        self.weight_scale, self.turned_scale = (torch.empty(size, 1, device=device) for size in (rows, columns))

    def store(self, weight: Tensor) -> None:
        """Quantise the folded weight [out, in], in place."""
        for matrix, q, scale in (
            (weight, self.weight, self.weight_scale),
            (weight.t().contiguous(), self.turned, self.turned_scale),
        ):
            for target, value in zip((q, scale), quantize_rows(matrix), strict=True):
                target.copy_(value)

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [self.weight, self.weight_scale, self.turned, self.turned_scale, self.bias]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, in] → [M, out]."""
        return product(*quantize_rows(x), self.weight, self.weight_scale, x.dtype, self.bias)

    def without_bias(self, x: Tensor, out: Tensor) -> Tensor:
        """x [M, in] → [M, out]."""
        return product(*quantize_rows(x), self.weight, self.weight_scale, x.dtype)

    def add_to(self, residual: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """residual [M, out] + linear(x) → [M, out]."""
        return torch.add(residual, self(x), out=out)

    def input_gradient(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """dy [M, out] → dx [M, in]."""
        return product(*quantize_rows(dy), self.turned, self.turned_scale, dy.dtype)
