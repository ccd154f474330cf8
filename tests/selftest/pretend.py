"""Implementations of attention that go wrong in every way; the child process of a test imports this module."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from fastnull.ops.attention import attention_out_sdpa
from fastnull.ops.dispatch import Implementation


def slow(qkv: Tensor, scale: float, o: Tensor) -> None:
    time.sleep(0.003)
    attention_out_sdpa(qkv, scale, o)


def wrong_in_bfloat16(qkv: Tensor, scale: float, o: Tensor) -> None:
    attention_out_sdpa(qkv, scale * (1.2 if qkv.dtype == torch.bfloat16 else 1.0), o)


def leaves_a_row(qkv: Tensor, scale: float, o: Tensor) -> None:
    written = torch.empty_like(o)
    attention_out_sdpa(qkv, scale, written)
    o[:, 1:] = written[:, 1:]


_calls: list[int] = []


def unsteady(qkv: Tensor, scale: float, o: Tensor) -> None:
    """Off by a rounding, by another one at every call."""
    _calls.append(0)
    attention_out_sdpa(qkv, scale, o)
    o.mul_(1 + len(_calls) * torch.finfo(o.dtype).eps / 8)
    o[0, 0, 0, 0].add_(len(_calls) * torch.finfo(o.dtype).eps / 8)


def raises(qkv: Tensor, scale: float, o: Tensor) -> None:
    raise RuntimeError("CUDA error:\n misaligned address")


def too_much_shared_memory(qkv: Tensor, scale: float, o: Tensor) -> None:
    raise RuntimeError("out of resource: shared memory, Required: 141312, Hardware limit: 101376")


def aborts(qkv: Tensor, scale: float, o: Tensor) -> None:
    if qkv.dtype == torch.float32:  # once is enough: every process takes its seconds to start
        os.abort()
    attention_out_sdpa(qkv, scale, o)


def hangs(qkv: Tensor, scale: float, o: Tensor) -> None:
    print("a line that is no answer")
    if qkv.dtype == torch.float32:
        time.sleep(1000)
    attention_out_sdpa(qkv, scale, o)


def implementations(op: str, device: torch.device, tiles: bool) -> dict[str, Implementation]:
    """In place of those of fastnull.ops.dispatch."""
    runs = (slow, raises, aborts, wrong_in_bfloat16, leaves_a_row, hangs, unsteady, too_much_shared_memory)
    found = {run.__name__: Implementation(run) for run in runs}
    found["declines"] = Implementation(raises, lambda *args: False)
    return found | {"fast": Implementation(attention_out_sdpa)}
