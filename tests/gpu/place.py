"""Where the tests of this folder run: on a GPU, or, to check the tests themselves, on the CPU (FASTNULL_DRY_RUN=1)."""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if GPU:  # these tests are of the kernels, whatever a self-test would say of them
    os.environ.setdefault("FASTNULL_KERNELS", "triton")
DEVICE = "cuda" if GPU else "cpu"
"""Also the name of the encoder's backend there."""
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU and os.environ.get("FASTNULL_DRY_RUN") != "1", reason="needs a CUDA device (torch sees none)"
    ),
]
# float16 is no dtype of the CPU's ops
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if GPU else [])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A normal tensor on the device, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)
