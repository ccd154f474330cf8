"""Products with GELU in cublasLt's epilogue, on a stand-in that does what it is told: transposes, strides, bias, z."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import testing
from fastnull.ops.linear_gelu import gelu_ref
from tests.cuda.emulated import guarded, guarded_nan

HALF = torch.bfloat16


def randn(*shape: int, seed: int) -> torch.Tensor:
    return guarded(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF))


# rows: odd, one; no two sizes alike, so that a swapped one shows
@pytest.mark.parametrize(("M", "K", "N"), [(5, 24, 40), (1, 16, 8), (33, 8, 16)])
def test_against_float64(kernels: torch._ops._OpNamespace, M: int, K: int, N: int) -> None:
    x, weight, bias = randn(M, K, seed=1), randn(N, K, seed=2), randn(N, seed=3)
    h, z = guarded_nan(M, N, dtype=HALF), guarded_nan(M, N, dtype=HALF)
    kernels.linear_gelu_aux_out(x, weight, bias, h, z)
    exact = F.linear(x.double(), weight.double(), bias.double())
    torchs = F.linear(x, weight, bias)
    testing.assert_within_budget(z, exact, torchs, "z")
    testing.assert_within_budget(h, gelu_ref(exact, None, "tanh")[0], F.gelu(torchs, approximate="tanh"), "h")

    dy, second, dz = randn(M, K, seed=4), randn(K, N, seed=5), guarded_nan(M, N, dtype=HALF)
    kernels.linear_dgelu_aux_out(dy, second, z, dz)
    slope = gelu_ref(z.double(), None, "tanh")[1]
    torchs = torch.ops.aten.gelu_backward(dy @ second, z, approximate="tanh")
    testing.assert_gradient_close(dz, dy.double() @ second.double() * slope, torchs, "dz")


def test_nothing_to_do_and_bad_input(kernels: torch._ops._OpNamespace) -> None:
    x, weight, bias, h = (torch.zeros(shape, dtype=HALF) for shape in ((3, 8), (16, 8), (16,), (3, 16)))
    kernels.linear_gelu_aux_out(x[:0], weight, bias, h[:0], h[:0])
    with pytest.raises(RuntimeError, match=r"z must be dense and have shape \[3, 16\]"):
        kernels.linear_gelu_aux_out(x, weight, bias, h, h[:2])
    with pytest.raises(RuntimeError, match=r"weight must be dense and have shape \[8, 16\]"):
        kernels.linear_dgelu_aux_out(x, torch.zeros(4, 8, dtype=HALF).t(), h, h)
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16"):
        kernels.linear_gelu_aux_out(x.float(), weight.float(), bias.float(), h.float(), h.float())
    with pytest.raises(RuntimeError, match=r"bias must have shape \[16\], the dtype of x"):
        kernels.linear_gelu_aux_out(x, weight, bias.float(), h, h.clone())
    with pytest.raises(RuntimeError, match="x must have columns in multiples of 8"):
        kernels.linear_gelu_aux_out(x[:, :4].contiguous(), weight[:, :4].contiguous(), bias, h, h.clone())
    wide = torch.zeros(4096, 8, dtype=HALF), torch.zeros(4096, dtype=HALF), torch.zeros(3, 4096, dtype=HALF)
    with pytest.raises(RuntimeError, match=r"cublasLt has no product \[3, 8\] x \[8, 4096\] with this epilogue"):
        kernels.linear_gelu_aux_out(x, *wide, wide[2].clone())
    halves = [t.half() for t in (x, weight, bias, h)]
    with pytest.raises(RuntimeError, match="cublasLtMatmulAlgoGetHeuristic of cublasLt failed with status 15"):
        kernels.linear_gelu_aux_out(*halves, halves[3].clone())  # the stand-in has bfloat16 alone
