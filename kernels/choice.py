"""Which kernel a CUDA tensor gets where there are two: Triton's, or the C++ one of csrc/cuda (docs/cuda.md).

One table, per op, GPU and number of tokens. Triton serves everything; the C++ kernels serve what `_served` says, and
only where nvcc built them. FASTNULL_CUDA_OPS overrides the table: names of OPS separated by commas, `all` or `none`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnull import _C
from fastnull.checks import check_choice

VARIABLE = "FASTNULL_CUDA_OPS"
NAMESPACE = "fastnull_cuda"  # of csrc/cuda/binding.cpp

OPS = {
    "attention": ("attention_out", "attention_dqkv_out"),
    "patch_project": ("patch_project_out",),
    "noise_objective": ("noise_objective_out", "noise_objective_means_out"),
    "noise_step": ("adamw_step_", "direct_step_"),
}
"""Ops that have a C++ kernel, and the launchers of each."""

ANY = 1 << 30


@dataclass(frozen=True)
class Choice:
    """Who serves an op on a GPU, up to a number of tokens (attention; others: ANY). The first that fits counts."""

    op: str
    gpu: str  # "sm_90", or "any"
    tokens: int
    kernel: str  # "triton" or "cuda"
    reason: str


CHOICES = (
    Choice("attention", "any", ANY, "triton", "unmeasured"),
    Choice("patch_project", "any", ANY, "triton", "unmeasured"),
    Choice("noise_objective", "any", ANY, "triton", "unmeasured"),
    Choice("noise_step", "any", ANY, "triton", "unmeasured"),
)

# What csrc/cuda/attention.cu takes.
LARGEST_TOKENS, HEADS, DTYPES = 272, (32, 64), (torch.bfloat16, torch.float16)


def asked() -> frozenset[str] | None:
    """The ops that FASTNULL_CUDA_OPS names; None where it is not set.

    Raises:
        ValueError: a name is not one of OPS.
    """
    text = os.environ.get(VARIABLE, "").replace(" ", "")
    if not text:
        return None
    if text in ("all", "none"):
        return frozenset(OPS if text == "all" else ())
    return frozenset(check_choice(VARIABLE, name, [*OPS, "all", "none"]) for name in text.split(",") if name)


@functools.cache
def _gpu(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _reads_in_16_bytes(x: Tensor) -> bool:
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])


def _served(op: str, tensors: list[Tensor]) -> bool:
    """True if the C++ kernel takes these tensors, the launcher's in their order."""
    if op != "attention":
        return True
    qkv = tensors[0]
    return (
        qkv.dtype in DTYPES
        and qkv.shape[1] <= LARGEST_TOKENS
        and qkv.shape[4] in HEADS
        and all(_reads_in_16_bytes(x) for x in tensors)
    )


def _chosen(op: str, device: torch.device, tokens: int = 0) -> str:
    return next(c.kernel for c in CHOICES if c.op == op and c.gpu in ("any", _gpu(device)) and tokens <= c.tokens)


def launcher(name: str, triton: Callable[..., None]) -> Callable[..., None]:
    """What to register for this launcher: the Triton one itself unless the table or the user may ask for the other.

    Raises:
        RuntimeError: FASTNULL_CUDA_OPS asks for a kernel that is not there.
    """
    op = next((op for op, names in OPS.items() if name in names), None)
    named = asked()
    if op is None or op not in (named if named is not None else {c.op for c in CHOICES if c.kernel == "cuda"}):
        return triton
    if not _C.cuda.load():
        if named is None:
            return triton
        raise RuntimeError(f"{VARIABLE} asks for the CUDA C++ kernel of {op}, but there is none: {_C.cuda.error}")
    cuda: Callable[..., None] = getattr(getattr(torch.ops, NAMESPACE), name)

    def launch(*args: object) -> None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        tokens = tensors[0].shape[1] if op == "attention" else 0
        takes = (named is not None or _chosen(op, tensors[0].device, tokens) == "cuda") and _served(op, tensors)
        (cuda if takes else triton)(*args)

    return launch
