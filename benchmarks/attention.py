"""torch's own implementations of attention, each by name: which of them run here, and which is the fastest.

torch's order of preference changes from release to release, so on a GPU a baseline gets the fastest one by the clock,
and its row names it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Variant, attempt, interleaved, percentiles, timer_for

IMPLEMENTATIONS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SECONDS, ROUNDS = 0.1, 5


def sdpa(qkv: Tensor) -> Tensor:
    """torch's attention on packed qkv [B, N, 3, H, d] → [B, N, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_by(name: str) -> AbstractContextManager[None]:
    """Inside, torch's attention is this implementation; "" leaves the choice to torch."""
    return sdpa_kernel(IMPLEMENTATIONS[name]) if name else nullcontext()


def forward_and_gradient(qkv: Tensor, name: str) -> Callable[[int], Any]:
    """A call that makes the output and its gradient with respect to qkv [B, N, 3, H, d] by this implementation."""
    leaf = qkv.detach().clone().requires_grad_(True)

    def call(index: int) -> Any:
        with attention_by(name):
            out = sdpa(leaf)
        return torch.autograd.grad(out, leaf, torch.ones_like(out))

    return call


def usable(qkv: Tensor) -> list[str]:
    """The implementations that take this packed qkv, forward and backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says why it refuses
        return [
            n for n in IMPLEMENTATIONS if not attempt(lambda n=n: forward_and_gradient(qkv, n)(0), str(qkv.device))[1]
        ]


def fastest(qkv: Tensor) -> str:
    """Of `usable`, the one whose forward and gradient together take the least time."""
    device = str(qkv.device)
    names, timer = usable(qkv), timer_for(device)
    calls = [timer.prepare(Variant(name, qkv.dtype, forward_and_gradient(qkv, name)), 1) for name in names]
    medians = [percentiles(times)[1] for times in interleaved(calls, 1, SECONDS, ROUNDS, timer)]
    return min(zip(medians, names, strict=True))[1]
