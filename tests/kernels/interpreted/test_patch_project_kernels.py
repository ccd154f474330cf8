"""Projection kernels against float64, and the tokens of the result."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, randn
from tests.ops import checks

# (B, C, H, W, p, D): p = 7 = tails in every tile, H != W; p = 5 and C = 1, less than a tile; p = 4: 160 patches, more
# than one tile of 128. Dropped: 14 (as 7), 16 and 32 (below, as a leak), 8 (as 4).
CASES = [(2, 3, 14, 21, 7, 40), (3, 1, 10, 15, 5, 7), (2, 3, 32, 40, 4, 20)]


def bases(C: int, p: int, D: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(DEVICE) for x in checks.bases(C, p, D))


@pytest.mark.parametrize(("complement", "add"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[int, ...], dtype: torch.dtype, complement: bool, add: bool) -> None:
    B, C, H, W, p, D = case
    _, null, row = bases(C, p, D)
    basis = row if complement else null
    noise, images = randn((B, C, H, W), dtype, 1), randn((B, C, H, W), dtype, 2) if add else None
    with testing.poisoned():
        result = ops.patch_project(noise, basis.float(), p, complement, images)
    checks.projection(result, noise, basis, p, complement, images)


@pytest.mark.parametrize("complement", [False, True])
def test_the_result_has_no_tokens(complement: bool) -> None:
    """At the size of S/16: 384 of 768 dimensions stay."""
    W, null, row = bases(3, 16, 384)
    noise = randn((1, 3, 32, 48), torch.float32, 3)
    checks.leak(W, ops.patch_project(noise, (row if complement else null).float(), 16, complement), noise, 16)


def test_channels_last_and_in_place() -> None:
    """Any strides are read and written in place; out may be the noise, or the images."""
    _, null, row = (b.float() for b in bases(3, 4, 20))
    noise, images = randn((2, 3, 8, 12), torch.float32, 4), randn((2, 3, 8, 12), torch.float32, 5)
    expected = ops.patch_project(noise, row, 4, True, images)
    last = noise.contiguous(memory_format=torch.channels_last)
    assert ops.patch_project(last, row, 4, True, images).equal(expected)
    assert ops.patch_project(noise.clone(), row, 4, True, images, out=images) is images
    assert images.equal(expected)
    alone = ops.patch_project(last, null, 4, False)
    assert ops.patch_project(last, null, 4, False, out=last) is last
    assert last.equal(alone)


def test_empty_batch_and_empty_basis() -> None:
    """Without a nullspace the projection is 0."""
    noise = randn((1, 1, 4, 4), torch.float32, 6)
    nothing = torch.empty(4, 0, device=DEVICE)
    assert not ops.patch_project(noise, nothing, 2, False).any()
    assert ops.patch_project(noise, nothing, 2, True).equal(noise)
    assert ops.patch_project(noise[:0], nothing, 2, True).shape == (0, 1, 4, 4)
