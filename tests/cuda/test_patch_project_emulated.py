"""The projection onto the nullspace, emulated: against float64, and the tokens of the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda.emulated import backwards, guarded, guarded_nan, randn
from tests.ops import checks
from tests.ops.checks import bases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, C, H, W, p, D): p = 7 = tails everywhere, H != W; p = 5 and C = 1 = less than a step; p = 4: 160 patches,
# more than one tile of 128.
CASES = [(2, 3, 14, 21, 7, 40), (3, 1, 10, 15, 5, 7), (2, 3, 32, 40, 4, 20)]


@pytest.mark.parametrize(("complement", "add"), [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(kernels: Any, case: tuple[int, ...], dtype: torch.dtype, complement: bool, add: bool) -> None:
    B, C, H, W, p, D = case
    _, null, row = bases(C, p, D)
    basis = row if complement else null
    noise = randn(B, C, H, W, seed=1, dtype=dtype)
    images = randn(B, C, H, W, seed=2, dtype=dtype) if add else None
    out = guarded_nan(B, C, H, W, dtype=dtype)
    kernels.patch_project_out(noise, guarded(basis.float()), p, complement, images, out)
    checks.projection(out, noise, basis, p, complement, images)


@pytest.mark.parametrize("complement", [False, True])
def test_the_result_has_no_tokens(kernels: Any, complement: bool) -> None:
    """At the size of S/16, on tensor cores that cut their sums off."""
    W, null, row = bases(3, 16, 384)
    noise, basis = randn(1, 3, 16, 32, seed=3), guarded((row if complement else null).float())
    result = guarded_nan(1, 3, 16, 32)
    kernels.patch_project_out(noise, basis, 16, complement, None, result)
    checks.leak(W, result, noise, 16)


def test_any_strides_in_place_and_any_order(kernels: Any) -> None:
    _, null, row = (b.float() for b in bases(3, 4, 20))
    noise, images, expected = randn(2, 3, 8, 12, seed=4), randn(2, 3, 8, 12, seed=5), guarded_nan(2, 3, 8, 12)
    kernels.patch_project_out(noise, row, 4, True, images, expected)
    last = noise.contiguous(memory_format=torch.channels_last)
    with backwards():
        kernels.patch_project_out(last, row, 4, True, images, images)
    assert images.equal(expected)
    alone = guarded_nan(2, 3, 8, 12)
    kernels.patch_project_out(noise, null, 4, False, None, alone)
    kernels.patch_project_out(last, null, 4, False, None, last)
    assert last.equal(alone)


def test_empty_basis_and_bad_input(kernels: Any) -> None:
    noise, out, nothing = randn(1, 1, 4, 4, seed=6), guarded_nan(1, 1, 4, 4), torch.empty(4, 0)
    kernels.patch_project_out(noise, nothing, 2, False, None, out)
    assert not out.any()
    kernels.patch_project_out(noise, nothing, 2, True, None, out)
    assert out.equal(noise)
    kernels.patch_project_out(noise[:0], nothing, 2, True, None, out[:0])
    with pytest.raises(RuntimeError, match=r"H and W multiples of patch_size"):
        kernels.patch_project_out(noise, nothing, 3, True, None, out)
    with pytest.raises(RuntimeError, match=r"basis must have shape \[4, n\]"):
        kernels.patch_project_out(noise, torch.zeros(5, 2), 2, True, None, out)
    with pytest.raises(RuntimeError, match="out has the wrong dtype"):
        kernels.patch_project_out(noise, torch.zeros(4, 2), 2, True, None, out.bfloat16())
