"""In which dtype matrix products are fastest on this processor.

Having bfloat16 instructions does not make them fast: on Xeons whose AMX is out of reach the bfloat16 dot product has
half the peak of float32 multiply-adds (docs/facts.md), on others it has twice or eight times as much. So it is timed,
once a process: a few milliseconds.
"""

from __future__ import annotations

import functools
import os
import time

import torch

from fastnull.checks import check_choice

CHOICES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products of an encoder of this dtype use: its own, but perhaps float32 for bfloat16 on a CPU.

    FASTNULL_CPU_PRODUCTS = float32 or bfloat16 decides without timing.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return dtype
    asked = CHOICES[check_choice("FASTNULL_CPU_PRODUCTS", os.environ.get("FASTNULL_CPU_PRODUCTS", "auto"), CHOICES)]
    return asked or _faster()


@functools.cache
def _faster() -> torch.dtype:
    seconds = {dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


def _seconds(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    """Least wall time of one product of two [size, size] matrices."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return min(times)
