"""Projection kernels against float64, and against the embedding that must not see the result."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from fastnull.ops.patch_project import patch_project_ref
from tests.kernels.interpreted.inputs import DEVICE, DTYPES, randn

# (B, C, H, W, p, D): p = 7 = tails in every tile, H != W; p = 5 and C = 1, less than a tile; p = 4: 160 patches, more
# than one tile of 128. Dropped: 14 (as 7), 16 and 32 (below, as a leak), 8 (as 4).
CASES = [(2, 3, 14, 21, 7, 40), (3, 1, 10, 15, 5, 7), (2, 3, 32, 40, 4, 20)]


def bases(C: int, p: int, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random embedding W [D, C p^2], and float64 bases of its nullspace [C p^2, k] and row space [C p^2, D]."""
    W = torch.randn(D, C * p * p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = torch.linalg.svd(W, full_matrices=True)[2].t()
    return W.to(DEVICE), full[:, D:].to(DEVICE), full[:, :D].to(DEVICE)


@pytest.mark.parametrize(("complement", "add"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[int, ...], dtype: torch.dtype, complement: bool, add: bool) -> None:
    B, C, H, W, p, D = case
    _, null, row = bases(C, p, D)
    basis = row if complement else null
    noise, images = randn((B, C, H, W), dtype, 1), randn((B, C, H, W), dtype, 2) if add else None
    reference = patch_project_ref(noise.double(), basis, p, complement, None if images is None else images.double())
    baseline = patch_project_ref(noise, basis.float(), p, complement, images)
    with testing.poisoned():
        result = ops.patch_project(noise, basis.float(), p, complement, images)
    testing.assert_gradient_close(result, reference, baseline, "projection")


@pytest.mark.parametrize("complement", [False, True])
def test_the_embedding_cannot_see_the_result(complement: bool) -> None:
    """||W P v|| / (||W|| ||v||) <= 1e-6 in float32, at the size of S/16: 384 of 768 dimensions stay."""
    W, null, row = bases(3, 16, 384)
    noise = randn((1, 3, 32, 48), torch.float32, 3)
    result = ops.patch_project(noise, (row if complement else null).float(), 16, complement)
    seen = torch.nn.functional.conv2d(result.double(), W.view(384, 3, 16, 16), stride=16).norm()
    assert seen / (torch.linalg.matrix_norm(W, 2) * noise.norm()) <= 1e-6
    assert result.norm() > 0.5 * noise.norm()


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
    """An embedding that sees everything has no nullspace: nothing is left of the noise."""
    noise = randn((1, 1, 4, 4), torch.float32, 6)
    nothing = torch.empty(4, 0, device=DEVICE)
    assert not ops.patch_project(noise, nothing, 2, False).any()
    assert ops.patch_project(noise, nothing, 2, True).equal(noise)
    assert ops.patch_project(noise[:0], nothing, 2, True).shape == (0, 1, 4, 4)
