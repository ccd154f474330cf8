"""The library's products at the shapes of a block's linears, by every call that an encoder could use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Case, Variant, copies_for, dtypes
from benchmarks.models import make_model
from benchmarks.work import ViTShape, linear
from fastnull.bench import BenchSettings
from fastnull.vit import split


def cases(settings: BenchSettings) -> Iterator[Case]:
    """Forward products of every linear of every model's block."""
    for name in settings.models:
        shape = ViTShape.of(split(make_model(name, settings)))
        for layer, (K, N) in shape.linears().items():
            yield _case(f"{name} {layer}", settings.batch * shape.N, K, N, settings)


def _case(op: str, M: int, K: int, N: int, settings: BenchSettings) -> Case:
    source = torch.Generator().manual_seed(settings.seed)
    copies = copies_for(4 * (M * K + K * N + M * N), settings.device)
    x, bias = torch.randn(M, K, generator=source), torch.randn(N, generator=source)
    weights = [torch.randn(N, K, generator=source) / K**0.5 for _ in range(copies)]
    # rounded once, so that all dtypes multiply the same numbers and the error is the product's own
    x, bias, weights = (_rounded(t, settings) for t in (x, bias, weights))
    variants = [v for dtype in dtypes(settings) for v in _variants(dtype, x, bias, weights)]
    return Case(
        "gemm", op, "forward", f"[{M},{K}]x[{K},{N}]", variants, ("F.linear", torch.float32),
        reference=lambda: F.linear(x.double(), weights[0].double(), bias.double()),
        work=lambda dtype: linear(M, K, N, dtype.itemsize), copies=copies,
    )  # fmt: skip


def _rounded(tensors: Any, settings: BenchSettings) -> Any:
    if isinstance(tensors, list):
        return [_rounded(t, settings) for t in tensors]
    narrow = min(dtypes(settings), key=lambda dtype: dtype.itemsize)
    return tensors.to(narrow).float().to(settings.device)


def _variants(dtype: torch.dtype, x: Tensor, bias: Tensor, weights: list[Tensor]) -> Iterator[Variant]:
    x, b, ws = x.to(dtype), bias.to(dtype), [w.to(dtype) for w in weights]
    out = torch.empty(len(x), len(b), dtype=dtype, device=x.device)
    turned = [w.t().contiguous() for w in ws]
    yield Variant("F.linear", dtype, lambda i: F.linear(x, ws[i], b), library=True, graph=True, twice=True)
    yield Variant("addmm", dtype, lambda i: torch.addmm(b, x, ws[i].t(), out=out), graph=True)
    yield Variant("copy, addmm_", dtype, lambda i: out.copy_(b).addmm_(x, ws[i].t()), graph=True)
    bare: dict[str, Any] = {"check": lambda: None, "graph": True, "note": "no bias"}
    yield Variant("mm", dtype, lambda i: torch.mm(x, ws[i].t(), out=out), **bare)
    yield Variant("mm, turned", dtype, lambda i: torch.mm(x, turned[i], out=out), **bare)
    if x.device.type == "cpu" and dtype != torch.float16 and torch.backends.mkldnn.is_available():
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, len(x)) for w in ws]
        pointwise = torch.ops.mkldnn._linear_pointwise
        yield Variant("oneDNN packed", dtype, lambda i: pointwise(x, packed[i], b, "none", [], ""))
    if dtype == torch.bfloat16:
        wide, product = torch.empty_like(x, dtype=torch.float32), torch.empty_like(out, dtype=torch.float32)
        weights32, bias32 = [w.float() for w in ws], b.float()

        def by_float32(i: int) -> Tensor:
            return out.copy_(torch.addmm(bias32, wide.copy_(x), weights32[i].t(), out=product))

        yield Variant("float32 product", dtype, by_float32, graph=True, note="bfloat16 in and out, float32 weights")


def test_gemm(benchmark: Any, variant: Variant) -> None:
    """pytest-benchmark's view of a variant."""
    benchmark(variant.call, 0)
