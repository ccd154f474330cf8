"""Projection of image noise onto the nullspace of a patch embedding, every CPU backend against float64."""

from __future__ import annotations

import pytest
import torch

from fastnull import ops, testing
from fastnull.ops.patch_project import patch_project_ref
from tests.ops import checks
from tests.ops.checks import bases

DTYPES = [torch.float32, torch.bfloat16]
# (B, C, H, W, p, D): p = 32 whole vectors; 14 and 5 = a tail in every line; C = 1 and 3; H != W; more patches than a
# panel holds (1568): the last case, 2312 of them. Dropped: p = 16 (as 32), 8 (as 14 on AVX-512).
CASES = [(2, 3, 64, 96, 32, 100), (2, 3, 28, 14, 14, 40), (3, 1, 10, 15, 5, 7), (2, 3, 136, 136, 4, 20)]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(backend: str, case: tuple[int, ...], dtype: torch.dtype, complement: bool, add: bool) -> None:
    B, C, H, W, p, D = case
    _, null, row = bases(C, p, D)
    basis = row if complement else null
    g = torch.Generator().manual_seed(1)
    noise = testing.randn((B, C, H, W), dtype, g)
    images = torch.rand(B, C, H, W, generator=g).to(dtype) if add else None
    with testing.poisoned():
        result = ops.patch_project(noise, basis.float(), p, complement, images)
    checks.projection(result, noise, basis, p, complement, images)


@pytest.mark.parametrize("complement", [False, True])
def test_the_result_has_no_tokens(backend: str, complement: bool) -> None:
    """At the size of ViT-B/32's patches: 2304 of 3072 dimensions stay."""
    W, null, row = bases(3, 32, 768)
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    # a caller's autocast must not reach the products
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ops.patch_project(noise, (row if complement else null).float(), 32, complement)
    checks.leak(W, result, noise, 32)


def test_projector_properties(backend: str) -> None:
    """Idempotent, self-adjoint, the two forms agree, and P + complement of P = identity."""
    _, null, row = (b.float() for b in bases(3, 8, 50))
    g = torch.Generator().manual_seed(3)
    v, u = (torch.randn(2, 3, 16, 24, generator=g) for _ in range(2))
    pv = ops.patch_project(v, row, 8, True)
    torch.testing.assert_close(ops.patch_project(pv, row, 8, True), pv, rtol=0, atol=5e-6)
    torch.testing.assert_close(ops.patch_project(v, null, 8, False), pv, rtol=0, atol=5e-6)
    torch.testing.assert_close(pv + ops.patch_project(v, row, 8, False), v, rtol=0, atol=5e-6)
    pu = ops.patch_project(u, row, 8, True)
    torch.testing.assert_close((u * pv).sum(), (pu * v).sum(), rtol=1e-4, atol=1e-4)
    zero = ops.patch_project(torch.zeros_like(v), row, 8, True, images=u)
    assert zero.equal(u)


def test_gradient_is_the_projection(backend: str) -> None:
    _, null, _ = bases(1, 4, 6)
    g = torch.Generator().manual_seed(4)
    noise, images, grad = (torch.randn(2, 1, 8, 8, generator=g).requires_grad_() for _ in range(3))
    result = ops.patch_project(noise, null.float(), 4, False, images)
    dnoise, dimages = torch.autograd.grad(result, (noise, images), grad)
    leaf = noise.detach().double().requires_grad_()
    (reference,) = torch.autograd.grad(patch_project_ref(leaf, null, 4, False), leaf, grad.detach().double())
    leaf32 = noise.detach().clone().requires_grad_()
    (baseline,) = torch.autograd.grad(patch_project_ref(leaf32, null.float(), 4, False), leaf32, grad.detach())
    testing.assert_gradient_close(dnoise, reference, baseline)
    assert dimages.equal(grad)


def test_layouts_and_in_place(backend: str) -> None:
    """channels_last, a crop, an expanded batch; out over the noise and over the images."""
    _, _, row = (b.float() for b in bases(3, 4, 10))
    g = torch.Generator().manual_seed(5)
    noise, images = (torch.randn(2, 3, 16, 8, generator=g) for _ in range(2))
    expected = patch_project_ref(noise, row, 4, True, images)
    layouts = [
        noise.contiguous(memory_format=torch.channels_last),
        torch.nn.functional.pad(noise, (2, 3, 1, 1), value=float("nan"))[:, :, 1:-1, 2:-3],
    ]
    for layout in layouts:
        torch.testing.assert_close(ops.patch_project(layout, row, 4, True, images), expected, rtol=0, atol=2e-6)
    shared = ops.patch_project(noise[:1].expand(2, -1, -1, -1), row, 4, True)
    torch.testing.assert_close(shared[0], shared[1], rtol=0, atol=2e-6)
    over_noise, over_images = noise.clone(), images.clone()
    ops.patch_project(over_noise, row, 4, True, images, out=over_noise)
    ops.patch_project(noise, row, 4, True, over_images, out=over_images)
    torch.testing.assert_close(over_noise, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(over_images, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("complement", [False, True])
def test_nan_stays_in_its_patch_and_edges_of_the_basis(backend: str, complement: bool) -> None:
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    noise[0, 0, 5, 5] = float("nan")
    _, null, row = (b.float() for b in bases(1, 4, 6))
    result = ops.patch_project(noise, row if complement else null, 4, complement)
    assert result[..., 4:, 4:].isnan().all()
    assert int(result.isnan().sum()) == 16
    # No direction at all: the nullspace of a full-rank square embedding is {0}, that of nothing is everything.
    nothing = ops.patch_project(torch.ones(1, 1, 8, 8), torch.empty(16, 0), 4, complement)
    assert nothing.equal(torch.full((1, 1, 8, 8), float(complement)))
    assert ops.patch_project(torch.empty(0, 1, 8, 8), row, 4, complement).shape == (0, 1, 8, 8)


def test_bad_arguments_are_named() -> None:
    basis = torch.zeros(48, 3)
    with pytest.raises(ValueError, match="multiples of 4; got"):
        ops.patch_project(torch.zeros(1, 3, 9, 8), basis, 4, True)
    with pytest.raises(ValueError, match=r"basis must have shape \[12, n\]"):
        ops.patch_project(torch.zeros(1, 3, 8, 8), basis, 2, True)
    with pytest.raises(ValueError, match="images must have the shape of noise"):
        ops.patch_project(torch.zeros(1, 3, 8, 8), basis, 4, True, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("patch_size", [0, -1, -4])
def test_a_patch_size_below_one_is_refused(backend: str, patch_size: int) -> None:
    """By the function and by the op itself, which would not write its output."""
    noise, basis = torch.zeros(1, 3, 8, 8), torch.zeros(48, 3)
    with pytest.raises(ValueError, match=f"patch_size must be at least 1; got {patch_size}"):
        ops.patch_project(noise, basis, patch_size, True)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="multiples of patch_size >= 1"):
            torch.ops.fastnull.patch_project_out(noise, basis, patch_size, True, None, torch.empty_like(noise))


@pytest.mark.parametrize("patch_size", [4.0, "4", True, None])
def test_a_patch_size_that_is_no_integer_is_refused(patch_size: object) -> None:
    with pytest.raises(TypeError, match="patch_size must be an integer; got"):
        ops.patch_project(torch.zeros(1, 3, 8, 8), torch.zeros(48, 3), patch_size, True)  # type: ignore[arg-type]


def test_opcheck(backend: str) -> None:
    noise = testing.randn((2, 3, 8, 12), torch.float32, torch.Generator().manual_seed(7))
    basis = torch.linalg.qr(torch.randn(48, 5, generator=torch.Generator().manual_seed(7)))[0].contiguous()
    testing.opcheck("patch_project_out", (noise, basis, 4, True, None, torch.empty(2, 3, 8, 12)))
    testing.opcheck("patch_project_out", (noise, basis, 4, False, noise.clone(), torch.empty(2, 3, 8, 12)))
