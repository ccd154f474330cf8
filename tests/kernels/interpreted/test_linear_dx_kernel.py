"""The product with LayerNorm's backward in its epilogue, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnull import ops, testing
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, nan, randn

# M, K, D: 130 and 140 = a tile of 128 and a tail; 96 = a step of 64 and a tail; 192 = whole steps, no mask.
SIZES = [(130, 96, 140), (3, 192, 128)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_norms_backward_in_the_epilogue(sizes: tuple[int, int, int], dtype: torch.dtype, residual: bool) -> None:
    M, K, D = sizes
    dz, weight, bias = randn((M, K), dtype, 0), randn((K, D), dtype, 1).contiguous() / D**0.5, randn((K,), dtype, 2)
    x, dres = (randn((M, D), dtype, seed).contiguous() for seed in (3, 4))
    z = F.linear(F.layer_norm(x, (D,)), weight, bias)
    _, mean, rstd = ops.layer_norm_stats(x, eps=1e-5)
    c1, c2 = ops.layer_norm_sums(dz, z, weight, bias)

    def gradient(dt: torch.dtype) -> torch.Tensor:
        leaf = x.to(dt).requires_grad_()
        out = F.linear(F.layer_norm(leaf, (D,)), weight.to(dt))
        dx = torch.autograd.grad(out, leaf, dz.to(dt))[0]
        return dx + dres.to(dt) if residual else dx

    exact, torchs = gradient(torch.float64), gradient(dtype)
    dx = dres if residual else nan(M, D, dtype=dtype)  # in place of the residual's gradient, as the encoder would
    torch.ops.fastnull.linear_layer_norm_dx_out(
        dz, weight, x, mean, rstd, c1, c2, dres.clone() if residual else None, dx
    )
    testing.assert_gradient_close(dx, exact, torchs, "dx")


def test_what_the_kernel_refuses() -> None:
    dz, w, x, row = (nan(*shape, dtype=torch.float16) for shape in ((4, 8), (8, 6), (4, 6), (4,)))
    row = row.float()
    launch = torch.ops.fastnull.linear_layer_norm_dx_out
    with pytest.raises(TypeError, match="must be all bfloat16 or all float16"):
        launch(dz.float(), w, x, row, row, row, row, None, x.clone())
    with pytest.raises(ValueError, match="shapes do not fit"):
        launch(dz, w[:7], x, row, row, row, row, None, x.clone())
    with pytest.raises(ValueError, match="dx must be dense"):
        launch(dz, w, x, row, row, row, row, None, torch.empty(6, 4, dtype=torch.float16, device=DEVICE).t())
