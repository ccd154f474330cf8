"""The exact-nullspace projection of a batch of images, against the two products in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.baselines import unfold_project
from benchmarks.common import Case, Variant, dtypes, name_of, ratio
from benchmarks.work import Work
from fastnull.bench import BenchSettings, Row
from fastnull.ops import patch_project

SIZE = 224
PATCHES = ((32, 768), (16, 384))
"""Patch size and rank of ViT-B/32 (3072 values per patch, of which the tokens see 768 directions) and ViT-S/16."""


def cases(settings: BenchSettings) -> Iterator[Case]:
    """noise − R Rᵀ noise for [B, 3, 224, 224]."""
    for patch, rank in PATCHES:
        yield _case(patch, rank, settings)


def _case(patch: int, rank: int, settings: BenchSettings) -> Case:
    B, values = settings.projected, 3 * patch**2
    source = torch.Generator(settings.device).manual_seed(settings.seed)
    made: dict[str, Any] = {"generator": source, "dtype": torch.float64, "device": settings.device}
    noise64 = torch.randn(B, 3, SIZE, SIZE, **made)
    basis64 = torch.linalg.qr(torch.randn(values, rank, **made)).Q.contiguous()
    rows = B * (SIZE // patch) ** 2
    narrow = min(dtypes(settings), key=lambda dtype: dtype.itemsize)
    noise64 = noise64.to(narrow).double()  # the noise is an input: its rounding is no error of the projection
    variants = []
    for dtype in dtypes(settings):
        noise, basis, low = noise64.to(dtype), basis64.float(), basis64.to(dtype)
        out, patches = torch.empty_like(noise), torch.randn(rows, values, **made).to(dtype)
        inner, outer = torch.empty(rows, rank).to(patches), torch.empty_like(patches)

        def products(
            index: int, patches: Any = patches, low: Any = low, inner: Any = inner, outer: Any = outer
        ) -> None:
            torch.mm(torch.mm(patches, low, out=inner), low.t(), out=outer)

        variants += [
            Variant(
                "fastnull", dtype, graph=True, twice=True,
                call=lambda i, n=noise, b=basis, o=out: patch_project(n, b, patch, True, out=o),
            ),
            Variant("unfold, fold", dtype, lambda i, n=noise, b=low: unfold_project(n, b, patch), library=True),
            Variant("two products", dtype, products, graph=True, note="on patches cut out before"),
        ]  # fmt: skip
    return Case(
        "projection", "patch_project", "forward", f"[{B},3,{SIZE},{SIZE}] patch {patch} rank {rank}", variants,
        ("two products", torch.float32), reference=lambda: unfold_project(noise64, basis64, patch),
        work=lambda dtype: Work(4 * rows * values * rank, 2 * noise64.numel() * dtype.itemsize), summary=_summary,
    )  # fmt: skip


def _summary(rows: Sequence[Row]) -> list[str]:
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        relative = ratio(rows, ("fastnull", dtype), ("two products", dtype))
        if relative is not None:
            lines.append(f"patch_project {dtype}: {relative:.2f} x the time of its two products alone")
    return lines


def test_projection(benchmark: Any, variant: Variant) -> None:
    """pytest-benchmark's view of a variant."""
    benchmark.extra_info["dtype"] = name_of(variant.dtype)
    benchmark(variant.call, 0)
