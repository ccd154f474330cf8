"""In which dtype matrix products are fastest on this processor, and products with weights in the library's own order.

bfloat16 instructions are not always fast: on Xeons without access to AMX the bfloat16 dot product has half the peak of
float32 multiply-adds (docs/facts.md), on others two or eight times as much. So both are timed, once per process.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastnull.checks import check_choice
from fastnull.ops.common import in_autocast

LEAST_WIDTH = 128
"""Width from which `auto` is bfloat16 on a CPU. In narrower models the products save less time than the copy of the
weights in every training step costs (docs/facts.md)."""
ROUNDS = 25
"""Timed products of each dtype: a tenth of a second."""
CHOICES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the products of an encoder of this dtype: its own, or perhaps float32 for bfloat16 on a CPU.

    FASTNULL_CPU_PRODUCTS=float32 or bfloat16 skips the timing.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return dtype
    asked = CHOICES[check_choice("FASTNULL_CPU_PRODUCTS", os.environ.get("FASTNULL_CPU_PRODUCTS", "auto"), CHOICES)]
    return asked or _faster()


def automatic_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that `auto` stands for: a 16-bit one for a float32 model where this machine multiplies it faster.

    Inside autocast it is the autocast dtype, on a GPU bfloat16, and on a CPU bfloat16 if its products are faster here
    and the model is at least LEAST_WIDTH wide. A model of another dtype keeps it.

    Args:
        weight: of the patch embedding [D, ...].
    """
    device = weight.device
    if weight.dtype != torch.float32:
        return weight.dtype
    if in_autocast(device):
        return torch.get_autocast_dtype(device.type)
    if device.type == "cpu" and len(weight) >= LEAST_WIDTH:
        return products_dtype(torch.bfloat16, device)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@functools.cache
def _faster() -> torch.dtype:
    """The dtype whose fastest product takes less time. Both are timed in turn, so that other load affects both."""
    products = {dtype: _product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(products, float("inf"))
    for _ in range(ROUNDS):
        for dtype, multiply in products.items():
            start = time.perf_counter()
            multiply()
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return min(seconds, key=lambda dtype: seconds[dtype])


def _product(dtype: torch.dtype, size: int = 512) -> Callable[[], object]:
    """A product of two [size, size] matrices."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    return functools.partial(torch.mm, a, b, out=torch.empty_like(a))


@functools.cache
def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype are packed: bfloat16 on the CPU, where oneDNN saves 4 to 12 % of a product by it.

    Products in float32 gain nothing (docs/facts.md).
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    try:
        one = torch.ones(2, 2, dtype=dtype)
        return bool((PackedProduct(one)(one, one[0], one) == 4).all())
    except (AttributeError, RuntimeError):
        return False  # the operators are undocumented, and some builds of torch lack them


class PackedProduct:
    """x W^T, with an optional bias and residual, for a weight W [out, in] in oneDNN's own order."""

    def __init__(self, weight: Tensor) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [M, in] → x W^T + bias + residual [M, out], rounded once."""
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")  # type: ignore[no-any-return]
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, bias, "add")  # type: ignore[no-any-return]
