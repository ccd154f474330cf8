"""The exact nullspace: its dimension for known models, invisible noise, and pre-images of tokens."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from fastnull.compat import import_timm
from fastnull.nullspace import PatchNullspace, patch
from fastnull.vit import NormalizedModel, split
from tests.conftest import run_example

# Nullity per patch of the joint matrix, max(0, 3p² − D), for the shapes (D, p) of the models.
NULLITY = {
    "Ti/16 and CaiT-XXS/16": (192, 16, 576),
    "S/16 and DINOv3-S/16": (384, 16, 384),
    "S/32": (384, 32, 2688),
    "B/32": (768, 32, 2304),
    "B/16, square": (768, 16, 0),
    "B/8": (768, 8, 0),
    "Swin-T/4": (96, 4, 0),
    "L/16": (1024, 16, 0),
    "L/32": (1024, 32, 2048),
    "H/14": (1280, 14, 0),
    "DINOv2-S/14: the kernel's own basis is the smaller one": (384, 14, 204),
    "DINOv2-B/14": (768, 14, 0),
    "EVA02-Ti/14": (192, 14, 396),
    "S/8": (384, 8, 0),
}

# D, C, ph, pw: complement basis; kernel basis; no kernel; more tokens than pixels; rectangular patches both ways; gray
SHAPES = [(8, 3, 4, 4), (30, 3, 4, 4), (48, 3, 4, 4), (60, 3, 4, 4), (10, 3, 2, 4), (20, 3, 4, 2), (9, 1, 4, 4)]


def random_space(width: int, channels: int, height: int, across: int, **options: float) -> PatchNullspace:
    return PatchNullspace(torch.randn(width, channels, height, across), **options)


def tokens(space: PatchNullspace, images: Tensor) -> Tensor:
    """W x for every patch, in float64 by torch's own convolution."""
    weight = space.weight.view(space.width, space.channels, *space.patch_size)
    return nn.functional.conv2d(images.double(), weight, stride=space.patch_size)


def leak(space: PatchNullspace, noise: Tensor, original: Tensor) -> float:
    """‖W·noise‖ / (‖W‖ ‖original‖), the spectral norm of W."""
    scale = float(space.singular_values[0]) * float(original.double().norm())
    return float(tokens(space, noise).norm()) / scale


@pytest.mark.parametrize("model", NULLITY)
def test_nullity_of_known_models(model: str) -> None:
    width, patch, nullity = NULLITY[model]
    space = PatchNullspace(nn.Conv2d(3, width, patch, patch).weight)
    assert (space.dim, space.rank) == (nullity, 3 * patch**2 - nullity)
    assert len(space.singular_values) == min(width, 3 * patch**2)
    images = torch.randn(1, 3, 2 * patch, 2 * patch)
    assert leak(space, space.project(images), images) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_an_orthogonal_projector_onto_the_kernel(shape: tuple[int, int, int, int]) -> None:
    space = random_space(*shape)
    size = (3, shape[1], 2 * shape[2], 3 * shape[3])
    images, other = torch.randn(size), torch.randn(size)
    with torch.autocast("cpu", torch.bfloat16):  # must not round the products
        part = space.project(images)
    assert space._basis.shape[1] == min(space.dim, space.rank)  # the cheaper of the two
    assert part.shape == images.shape
    assert part.dtype == torch.float32
    assert leak(space, part, images) <= 1e-6
    torch.testing.assert_close(space.project(part), part, rtol=0, atol=5e-6)
    left, right = (part.double() * other).sum(), (images.double() * space.project(other)).sum()
    assert abs(left - right) <= 1e-5 * images.norm() * other.norm()
    # what remains is in the row space, so the parts are orthogonal and the dimensions add up
    basis = space.project(torch.eye(space.dim + space.rank).view(-1, shape[1], *shape[2:]))
    assert abs(float(basis.flatten(1).trace()) - space.dim) <= 1e-4


def test_projection_against_the_definition_in_float64() -> None:
    space = random_space(20, 3, 4, 4)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pinv = torch.linalg.pinv(space.weight)
    columns = nn.functional.unfold(images, 4, stride=4)  # [B, K, N]
    columns = columns - pinv @ (space.weight @ columns)
    expected = nn.functional.fold(columns, (8, 8), 4, stride=4)
    torch.testing.assert_close(space.project(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (30, 3, 4, 4), (10, 3, 2, 4)])
def test_projection_is_differentiable(shape: tuple[int, int, int, int]) -> None:
    space = random_space(*shape)
    images = torch.randn(2, shape[1], shape[2], 2 * shape[3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(space.project, images)
    weights = torch.randn_like(images)
    (gradient,) = torch.autograd.grad((space.project(images) * weights).sum(), images)
    torch.testing.assert_close(gradient, space.project(weights))


def test_projection_takes_views_empty_batches_and_16_bits() -> None:
    space = random_space(8, 3, 4, 4)
    big = torch.full((4, 3, 24, 24), math.nan)
    big[::2, :, 4:20, 3:19] = torch.randn(2, 3, 16, 16)
    view = big[::2, :, 4:20, 3:19]  # strided, NaN all around it
    torch.testing.assert_close(space.project(view), space.project(view.contiguous()), rtol=0, atol=1e-6)
    channels_last = view.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(space.project(channels_last), space.project(view), rtol=0, atol=1e-6)
    assert space.project(torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)
    for dtype in (torch.bfloat16, torch.float16):
        part = space.project(view.to(dtype))
        assert part.dtype == dtype
        assert leak(space, part, view) <= torch.finfo(dtype).eps


def test_no_nullspace_projects_to_zero_and_keeps_the_graph() -> None:
    space = random_space(60, 3, 4, 4)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    part = space.project(images)
    assert torch.equal(part, torch.zeros_like(part))
    (gradient,) = torch.autograd.grad(part.sum(), images)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    for call in (space.sample, space.maximize):
        with pytest.raises(
            ValueError, match=r"no nullspace: its 60x48 matrix has rank 48.*site 'patch'.*vit_small_patch16"
        ):
            call(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("changes", [{}, {"img_size": (8, 24)}, {"patch_size": (4, 8), "embed_dim": 64}])
def test_exact_noise_does_not_change_logits(make_vit: Callable[..., NormalizedModel], changes: dict) -> None:
    """Noise of each image's own norm; random noise of that norm is the control."""
    model = make_vit(**changes)
    # unequal std: without it in the matrix the noise would be invisible to another model
    model = NormalizedModel(model.network, [0.48, 0.46, 0.41], [0.3, 0.2, 0.1]).eval()
    images = torch.rand(4, 3, *model.network.patch_embed.img_size)
    space = PatchNullspace.from_model(model)
    scale = float(images.square().mean().sqrt())
    noise = space.sample(images, scale)
    control = torch.randn_like(noise)
    control *= noise.norm() / control.norm()
    with torch.no_grad():
        clean, hidden, seen = model(images), model(images + noise), model(images + control)
        exact = copy.deepcopy(model).double()(images.double())
    rounding = float((clean - exact).abs().max())
    # the noise makes pixels, hence the rounding of the products, larger by a small factor
    assert float((hidden - clean).abs().max()) <= 30 * rounding
    assert float((seen - clean).abs().max()) >= 1e4 * rounding


def test_images_that_are_not_whole_patches(make_vit: Callable[..., NormalizedModel]) -> None:
    """The border gets no noise; the whole patches are those of the image without it."""
    for width, patch_size in ((20, 4), (40, 4), (40, (4, 6))):
        model = make_vit(img_size=(18, 20), patch_size=patch_size, embed_dim=width)
        space = PatchNullspace.from_model(model)
        images = 0.2 + 0.6 * torch.rand(2, 3, 18, 20)
        whole = space.whole_patches(images)
        height, across = whole.shape[2:]
        assert (height, across) == (16, 20 - 20 % space.patch_size[1])
        inside = torch.zeros(18, 20, dtype=torch.bool)
        inside[:height, :across] = True
        for noise in (space.project(images), space.sample(images), space.maximize(images) - images):
            assert noise.shape == images.shape
            assert not noise[..., ~inside].any()
            assert float(noise.norm()) > 0.1
            with torch.no_grad():
                torch.testing.assert_close(model(images + noise), model(images), rtol=0, atol=2e-5)
        torch.testing.assert_close(space.project(images)[..., :height, :across], space.project(whole))
        assert torch.equal(space.maximize(images)[..., :height, :across], space.maximize(whole))
        rms = space.sample(images, 0.1).square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(rms, torch.full((2,), 0.1))
        outside = images.clone()
        outside[0, 0, 17, 0] = 1.5
        with pytest.raises(ValueError, match="images must lie within bounds"):
            space.maximize(outside)


def test_nullspace_of_a_plain_model(make_vit: Callable[..., NormalizedModel]) -> None:
    wrapped = make_vit()
    wrapped = NormalizedModel(wrapped.network, [0.5] * 3, [0.3, 0.2, 0.1])
    inner, outer = PatchNullspace.from_model(wrapped.network), PatchNullspace.from_model(wrapped)
    images = torch.randn(2, 3, 16, 16)
    assert leak(inner, inner.project(images), images) <= 1e-6
    # the same noise in normalised units is noise · std in pixels
    pixels = inner.project(images) * wrapped.std
    torch.testing.assert_close(outer.project(pixels), pixels, rtol=0, atol=1e-5)
    assert (outer.project(inner.project(images)) - inner.project(images)).norm() > 0.01 * images.norm()
    torch.testing.assert_close(PatchNullspace.from_model(split(wrapped)).weight, outer.weight)
    torch.testing.assert_close(PatchNullspace.from_model(torch.compile(wrapped)).weight, outer.weight)
    half = PatchNullspace.from_model(copy.deepcopy(wrapped).bfloat16())
    assert half.dim == outer.dim


def test_low_rank_weight_stored_in_float32() -> None:
    """A float32 matrix of rank 10: its zeros are about 1e-8 of the largest value, far above float64's rounding."""
    weight = (torch.randn(32, 10) @ torch.randn(10, 48)).view(32, 3, 4, 4)
    space = PatchNullspace(weight)
    assert space.rank == 10
    assert float(space.singular_values[10]) > 1e-12 * float(space.singular_values[0])
    assert PatchNullspace(weight, tolerance=1e-12).rank == 32
    images = torch.randn(1, 3, 4, 4)
    assert leak(space, space.project(images), images) <= 1e-6


def test_small_singular_values_that_float32_can_see_are_kept() -> None:
    """A relative 1e-5 is below the rule of thumb max(D, K)·eps32 of scipy.linalg.null_space, yet no kernel."""
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (768, 768))
    values = torch.logspace(0, -5, 768, dtype=torch.float64)
    weight = ((u * values) @ v).float().view(768, 3, 16, 16)
    assert PatchNullspace(weight).dim == 0
    assert PatchNullspace(weight, tolerance=768 * 2**-23).dim > 0


def test_float64_weights_have_the_tolerance_of_the_svd() -> None:
    weight = torch.randn(32, 3, 4, 4, dtype=torch.float64)
    assert PatchNullspace(weight).tolerance == 48 * 2**-52
    assert PatchNullspace(weight.float()).tolerance == PatchNullspace(weight.bfloat16()).tolerance == 2**-23


def test_all_zero_weight_hides_everything() -> None:
    space = PatchNullspace(torch.zeros(8, 3, 4, 4))
    images = torch.rand(2, 3, 8, 8)
    assert (space.rank, space.dim) == (0, 48)
    assert torch.equal(space.project(images), images)
    noise, residual = space.preimage(torch.randn(2, 4, 8))
    assert torch.equal(noise, torch.zeros(2, 3, 8, 8))
    assert torch.equal(residual, torch.ones(2))


def test_sample_has_the_scale_asked_for_and_repeats() -> None:
    space = random_space(8, 3, 4, 4)
    like = torch.rand(5, 3, 8, 12)
    first = space.sample(like, 0.25, torch.Generator().manual_seed(3))
    torch.testing.assert_close(first.square().mean(dim=(1, 2, 3)).sqrt(), torch.full((5,), 0.25))
    assert leak(space, first, first) <= 1e-6
    assert torch.equal(first, space.sample(like, 0.25, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, space.sample(like, 0.25, torch.Generator().manual_seed(4)))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(space.sample(like, 0.0), torch.zeros_like(like))
    assert space.sample(like[:0]).shape == (0, 3, 8, 12)
    assert space.sample(like.bfloat16()).dtype == torch.bfloat16
    assert not space.sample(like.clone().requires_grad_()).requires_grad


# 8 < 48 has a kernel, 48 is square, 60 > 48 leaves tokens that no image makes; the rectangular one has its own layout
@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (48, 3, 4, 4), (60, 3, 4, 4), (10, 3, 2, 4)])
def test_preimage_is_the_least_norm_least_squares_solution(shape: tuple[int, int, int, int]) -> None:
    space = random_space(*shape)
    noise = torch.randn(2, 3, 6, space.width, dtype=torch.float64)
    images, residual = space.preimage(noise, grid=(2, 3))
    assert images.shape == (2, 3, shape[1], 2 * shape[2], 3 * shape[3])
    assert residual.shape == (2, 3)
    solved = torch.linalg.lstsq(space.weight, noise.view(-1, space.width).T, driver="gelsd").solution.T  # [M, K]
    folded = nn.functional.fold(
        solved.view(6, 6, -1).transpose(1, 2), images.shape[-2:], space.patch_size, stride=space.patch_size
    )
    torch.testing.assert_close(images, folded.view_as(images), rtol=1e-8, atol=1e-8)
    made = tokens(space, images.flatten(0, 1)).flatten(2).transpose(1, 2).view_as(noise)
    missed = (made - noise).flatten(2).norm(dim=-1) / noise.flatten(2).norm(dim=-1)
    torch.testing.assert_close(residual, missed, rtol=1e-6, atol=1e-10)
    assert bool((residual > 0.1).all()) if space.width > 48 else bool((residual < 1e-9).all())
    hidden = space.project(images.flatten(0, 1))
    torch.testing.assert_close(hidden, torch.zeros_like(hidden), rtol=0, atol=1e-8)  # least norm


def test_preimage_of_real_token_noise_moves_the_tokens_as_asked(vit: NormalizedModel, images: Tensor) -> None:
    space = PatchNullspace.from_model(vit)
    noise = 0.1 * torch.randn(8, 16, 32)
    pixels, residual = space.preimage(noise)
    adapter = split(vit)
    with torch.no_grad():
        moved = adapter.patch(images + pixels) - adapter.patch(images)
    torch.testing.assert_close(moved, noise, rtol=0, atol=1e-5)
    assert float(residual.max()) < 1e-6


@pytest.mark.parametrize("width", [8, 48, 60])
def test_bounded_preimage_agrees_with_scipy(width: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    space = random_space(width, 3, 4, 4)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    noise = 3 * torch.randn(2, 4, width, dtype=torch.float64)
    pixels, residual = space.preimage(noise, (-images, 1 - images))
    assert float((images + pixels).min()) >= -1e-12
    assert float((images + pixels).max()) <= 1 + 1e-12
    patches = nn.functional.unfold(images, 4, stride=4).transpose(1, 2)  # [B, N, K]
    for i in range(2):
        squares = 0.0
        for n in range(4):
            bounds = (-patches[i, n].numpy(), 1 - patches[i, n].numpy())
            best = optimize.lsq_linear(space.weight.numpy(), noise[i, n].numpy(), bounds, tol=1e-13)
            squares += 2 * best.cost
        assert abs(float(residual[i]) - math.sqrt(squares) / float(noise[i].norm())) <= 1e-4


def test_a_warning_for_tokens_wider_than_a_patch() -> None:
    space = random_space(60, 3, 4, 4)
    noise = torch.randn(2, 4, 60)
    with pytest.warns(
        RuntimeWarning, match=r"tokens of width 60 hold more than the 48 values.* than 4\d % of its norm"
    ):
        _, residual = space.preimage(noise)
    assert bool((residual > 0.3).all())
    with pytest.warns(RuntimeWarning, match="tokens of width 60"):
        space.preimage(noise, bounds=(-1.0, 1.0))
    reachable = torch.randn(2, 4, 48) @ space.weight.float().T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, residual = space.preimage(reachable)
        random_space(40, 3, 4, 4).preimage(noise[..., :40])
    assert bool((residual < 1e-5).all())


def test_bounds_that_are_not_active_change_nothing() -> None:
    space = random_space(8, 3, 4, 4)
    noise = 0.01 * torch.randn(4, 8)
    free, bounded = space.preimage(noise), space.preimage(noise, (-10.0, 10.0))
    torch.testing.assert_close(free, bounded)
    assert free[0].shape == (3, 8, 8)
    assert free[1].shape == ()
    wide = random_space(60, 3, 4, 4)
    zero, residual = wide.preimage(torch.zeros(1, 4, 60))
    assert torch.equal(zero, torch.zeros(1, 3, 8, 8))
    assert torch.equal(residual, torch.zeros(1))
    assert wide.preimage(torch.zeros(0, 4, 60), (-1, 1))[0].shape == (0, 3, 8, 8)


def test_copies_work_alone(images: Tensor) -> None:
    space = random_space(8, 3, 4, 4)
    space.project(images)
    assert torch.equal(copy.deepcopy(space).project(images), space.project(images))
    assert repr(space) == "PatchNullspace(dim=40, rank=8, patch=4x4, channels=3, width=8, tolerance=1.2e-07)"


# what timm calls them: two hybrids (a CNN before the projection), conv stems, overlapping patches, no convolution
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "stride = kernel size"),
        ("vit_tiny_r_s16_p8_224", "StdConv2dSame"),
        ("xcit_nano_12_p16_224", "overlap"),
        ("volo_d1_224", "overlap"),
        ("hiera_tiny_224", "overlap"),
        ("pit_ti_224", "overlap"),
        ("crossvit_9_240", "patch embedding"),
        ("naflexvit_base_patch16_gap", "images go through Linear"),
    ],
)
def test_models_without_plain_patches_are_refused(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = import_timm().create_model(name)
    with pytest.raises(ValueError, match=reason):
        PatchNullspace.from_model(model)


class Standardised(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return self._conv_forward(images, self.weight - self.weight.mean(), self.bias)


def with_projection(projection: nn.Module) -> nn.Module:
    """A model without configuration."""
    model = nn.Module()
    model.patch_embed = nn.Module()
    model.patch_embed.proj = projection
    return model


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (nn.Conv2d(3, 6, 4, 2), "without padding, dilation or groups"),
        (nn.Conv2d(3, 6, 4, 4, padding=1), "without padding, dilation or groups"),
        (nn.Conv2d(3, 6, 4, 4, dilation=2), "without padding, dilation or groups"),
        (nn.Conv2d(3, 6, 4, 4, groups=3), "without padding, dilation or groups"),
        (nn.Conv2d(3, 6, 4, 1, padding="same"), "without padding, dilation or groups"),
        (Standardised(3, 6, 4, 4), "images go through Standardised"),
    ],
)
def test_other_projections_are_refused(projection: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchNullspace.from_model(with_projection(projection))


def test_projections_without_a_configuration() -> None:
    space = PatchNullspace.from_model(with_projection(nn.Conv2d(3, 6, (2, 4), (2, 4))))
    assert (space.dim, space.patch_size) == (18, (2, 4))
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 4, 4))
    with torch.no_grad():
        normed.parametrizations.weight.original0[2:] = 0
    assert PatchNullspace.from_model(with_projection(normed)).rank == 2


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0], TypeError, "weight must be a floating tensor"),
        (torch.zeros(4, 3, 2, 2, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(4, 12), ValueError, r"got \[4, 12\]"),
        (torch.zeros(0, 3, 2, 2), ValueError, "none of them 0"),
        (torch.full((4, 3, 2, 2), math.nan), ValueError, "48 NaN"),
        (torch.zeros(4, 3, 2, 2, device="meta"), ValueError, "meta device"),
    ],
)
def test_bad_weights(weight: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchNullspace.from_weight(weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "NoneType"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(3, 8, 8), ValueError, r"\[B, 3, H, W\]; got \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"got \[1, 1, 8, 8\]"),
        (torch.zeros(1, 3, 8, 3), ValueError, "at least one patch of 4x4 pixels; got 8x3"),
    ],
)
def test_bad_images(images: object, error: type[Exception], message: str) -> None:
    space = random_space(8, 3, 4, 4)
    for call in (space.project, space.sample):
        with pytest.raises(error, match=message):
            call(images)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("noise", "options", "message"),
    [
        (torch.zeros(4, 9), {}, r"\[\.\.\., N, 8\]; got \[4, 9\]"),
        (torch.zeros(8), {}, "got"),
        (torch.zeros(5, 8), {}, "holds 5 patch tokens and they fill no square; give grid"),
        (torch.zeros(6, 8), {"grid": (2, 2)}, "grid 2x2 does not hold them"),
        (torch.full((4, 8), math.inf), {}, "32 Inf"),
        (torch.zeros(4, 8), {"bounds": (1.0, 0.0)}, "low <= high"),
        (torch.zeros(4, 8), {"bounds": (-math.inf, 0.0)}, "bounds must be finite"),
        (torch.zeros(4, 8), {"bounds": (torch.zeros(3, 4, 4), 1.0)}, r"broadcast to \[3, 8, 8\]; got \[3, 4, 4\]"),
    ],
)
def test_bad_token_noise(noise: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_space(8, 3, 4, 4).preimage(noise, **options)


def test_bad_arguments() -> None:
    space = random_space(8, 3, 4, 4)
    with pytest.raises(TypeError, match="token_noise must be a floating tensor"):
        space.preimage(torch.zeros(4, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="scale must be >= 0"):
        space.sample(torch.zeros(1, 3, 4, 4), -1.0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        PatchNullspace.from_model("vit")  # type: ignore[arg-type]
    for tolerance in (-1e-3, 1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be"):
            random_space(4, 3, 2, 2, tolerance=tolerance)


def low_pass_space(width: int = 40) -> PatchNullspace:
    """A patch embedding for smooth patterns, like trained ones: many bounds are active."""
    smooth = nn.functional.avg_pool2d(torch.randn(width, 3, 12, 12), 5, stride=1)  # [D, 3, 8, 8]
    return PatchNullspace(smooth)


@pytest.mark.parametrize("towards", ["a picture", "the far bound"])
def test_the_largest_change_agrees_with_scipy(towards: str) -> None:
    """Of all pictures in [0, 1] with these tokens the nearest to the target, against a bounded least-squares solver."""
    optimize = pytest.importorskip("scipy.optimize")
    space = low_pass_space()
    images = torch.rand(2, 3, 8, 16)
    images[0, :, :, :8] = (images[0, :, :, :8] > 0.5).float()  # half of the box's sides touch it
    target = torch.rand(2, 3, 8, 16) if towards == "a picture" else None
    changed = space.maximize(images, target)
    aim = target if target is not None else (images <= 0.5).float()
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    assert leak(space, changed - images, aim - images) < 2e-6
    rows = 1e4 * torch.linalg.svd(space.weight, full_matrices=False)[2].numpy()  # tokens as a penalty
    matrix = numpy.vstack([numpy.eye(192), rows])
    for i in range(2):
        for cut in (slice(0, 8), slice(8, 16)):
            x, t, found = (y[i, :, :, cut].double().flatten().numpy() for y in (images, aim, changed))
            best = optimize.lsq_linear(matrix, numpy.concatenate([t - x, numpy.zeros(len(rows))]), (-x, 1 - x + 1e-12))
            assert numpy.linalg.norm(found - t) <= 1.001 * numpy.linalg.norm(best.x - (t - x))


def test_the_largest_change_does_not_change_logits(vit: NormalizedModel, images: Tensor) -> None:
    changed = PatchNullspace.from_model(vit).maximize(images)
    with torch.no_grad():
        torch.testing.assert_close(vit(changed), vit(images), rtol=0, atol=1e-5)
        assert float((vit(images.flip(-1)) - vit(images)).abs().max()) > 0.1
    assert float((changed - images).square().mean().sqrt()) > 0.2
    towards = PatchNullspace.from_model(vit).maximize(images, images[0])
    torch.testing.assert_close(towards[0], images[0])
    assert float((towards - images[0]).norm()) < float((images - images[0]).norm())


def test_bounds_of_the_largest_change() -> None:
    space, images = random_space(8, 3, 4, 4), torch.rand(2, 3, 8, 8) * 0.5 + 0.25
    near = space.maximize(images, bounds=(images - 0.1, images + 0.1))
    assert float((near - images).abs().max()) <= 0.1 + 1e-6
    assert float((near - images).abs().max()) > 0.099
    assert space.maximize(images.half()).dtype == torch.float16
    assert space.maximize(images[:0]).shape == (0, 3, 8, 8)
    by_rounding = torch.full((1, 3, 4, 4), -3e-8)
    assert float(space.maximize(by_rounding).min()) >= 0


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (torch.zeros(3, 8, 8), {}, ValueError, r"\[B, 3, H, W\]"),
        (torch.full((1, 3, 8, 8), math.nan), {}, ValueError, "images must be finite"),
        (torch.full((1, 3, 8, 8), 1.5), {}, ValueError, "images must lie within bounds; they leave them by up to 0.5"),
        (torch.zeros(1, 3, 8, 8), {"bounds": (1.0, 0.0)}, ValueError, "low <= high"),
        (torch.zeros(1, 3, 8, 8), {"bounds": (0.0, math.inf)}, ValueError, "bounds must be finite"),
        (torch.zeros(1, 3, 8, 8), {"target": torch.zeros(1, 3, 4, 4)}, ValueError, r"got \[1, 3, 4, 4\]: resize"),
        (torch.zeros(1, 3, 8, 8), {"target": torch.zeros(3, 8, 8, dtype=torch.uint8)}, TypeError, "uint8"),
        (torch.zeros(1, 3, 8, 8), {"target": torch.full((3, 8, 8), math.inf)}, ValueError, "target must be finite"),
    ],
)
def test_bad_requests_for_the_largest_change(
    images: Tensor, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        random_space(8, 3, 4, 4).maximize(images, **options)


def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    output = run_example("hidden_change.py", "--out", str(tmp_path / "seen.png"))
    assert (tmp_path / "seen.png").stat().st_size > 10_000
    classes = re.findall(r"class (\d+), pixels changed by ([\d.]+) rms, logits by (\S+) at most", output)
    assert len(classes) == 3
    assert len({label for label, _, _ in classes}) == 1
    assert all(float(pixels) > 0.1 and float(logits) < 1e-3 for _, pixels, logits in classes[1:])


def test_a_gpu_s_projection_has_its_kernels_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For float32 and where kernels serve; library calls otherwise."""
    asked: list[str] = []
    monkeypatch.setattr(patch, "prove", lambda problems, device: asked.extend(each.name for each in problems))
    reasons = {"cuda:0": "", "cuda:1": "the kernels need Triton"}
    monkeypatch.setattr(patch, "gpu_problem", lambda device: reasons[str(device)])
    for device in reasons:
        for dtype in (torch.float32, torch.float64):
            patch._prove.__wrapped__(torch.device(device), dtype, 16, 768, True)
    assert asked == ["patch_project_out float32 16 768 1"]
