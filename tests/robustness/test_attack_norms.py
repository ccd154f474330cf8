"""Attacks on models whose gradients are far too small or too large to be squared in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastnull.robustness import apgd, cw_l2, fgsm, mi_fgsm, patch_attack, pgd
from fastnull.robustness.attacks.base import Starts, Victim, direction, length, project, scaled

EPS = {"linf": 8 / 255, "l2": 0.25}
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": lambda *a, **k: pgd(*a, random_start=False, **k),
    "pgd_random_start": pgd,
    "mi_fgsm": mi_fgsm,
    "apgd": lambda *a, **k: apgd(*a, steps=10, **k),
}
SIZES = tuple(2.0**power for power in (-132, -126, -100, -76, -40, 0, 40, 63, 100))
"""From 2e-40 to 1e30; powers of two, so that the attacks' arithmetic is the same to the bit."""


class Linear(nn.Module):
    """Two classes; the gradient of their logits is `size` times w and -w at every image."""

    def __init__(self, bias: float = 0.0, size: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        weight = torch.randn(192, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter((weight / weight.norm()).to(dtype))
        self.bias, self.size = bias, size

    def forward(self, images: Tensor) -> Tensor:
        rise = _Steep.apply((images.flatten(1) - 0.5) @ self.weight, self.size)
        return torch.stack([self.bias + rise, -rise], 1)


class _Steep(torch.autograd.Function):
    """The values, with a gradient of another size: no model's own arithmetic comes between it and the attack."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, size: float) -> Tensor:
        ctx.size = size
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


def sizes(change: Tensor, norm: str) -> Tensor:
    flat = change.double().flatten(1)
    return flat.norm(dim=1) if norm == "l2" else flat.abs().amax(1)


@pytest.fixture
def images() -> Tensor:
    return 0.4 + 0.2 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("bias", [0.0, 60.0, 80.0])
def test_sure_models_do_not_drive_attacks_out_of_the_ball(images: Tensor, name: str, norm: str, bias: float) -> None:
    # the cross entropy of a sure prediction has gradients of exp(-bias): 60 → 1e-26, 80 → 1e-35
    model = Linear(bias)
    change = ATTACKS[name](model, images, LABELS, EPS[norm], norm=norm) - images
    assert sizes(change, norm).max() <= EPS[norm] * (1 + 1e-6)
    if name == "apgd" and bias:
        return  # keeps its best loss, which is 0 everywhere in float32
    gained = -(change.flatten(1) @ model.weight)
    best = EPS["l2"] if norm == "l2" else EPS["linf"] * model.weight.abs().sum()
    assert gained.min() >= 0.95 * best, "the whole radius is used, along the gradient"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("size", SIZES)
def test_the_size_of_the_gradient_has_no_effect(images: Tensor, name: str, norm: str, size: float) -> None:
    found = ATTACKS[name](Linear(size=size), images, LABELS, EPS[norm], norm=norm)
    expected = ATTACKS[name](Linear(), images, LABELS, EPS[norm], norm=norm)
    if size > 1e-35:
        assert torch.equal(found, expected)
    else:  # subnormal numbers have few bits
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert sizes(found - images, norm).max() <= EPS[norm] * (1 + 1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_gradient_is_no_step_and_no_nan(images: Tensor, name: str, norm: str) -> None:
    found = ATTACKS[name](Linear(size=0.0), images, LABELS, EPS[norm], norm=norm)
    assert torch.isfinite(found).all()
    assert sizes(found - images, norm).max() <= EPS[norm] * (1 + 1e-6)
    if name in ("fgsm", "mi_fgsm", "pgd"):
        assert torch.equal(found, images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_model_and_images(images: Tensor, name: str, norm: str, dtype: torch.dtype) -> None:
    model = Linear(bias=4.0, dtype=dtype)
    for given in (images, images.to(dtype)):
        found = ATTACKS[name](model, given, LABELS, EPS[norm], norm=norm)
        assert found.dtype == given.dtype
        # one rounding to 16 bits at the end
        rounding = torch.finfo(given.dtype).eps if given.dtype.itemsize == 2 else 1e-6
        bound = EPS[norm] + (rounding * 192**0.5 if norm == "l2" else rounding)
        assert sizes(found - given, norm).max() <= bound
        assert ((found - given).flatten(1).float() @ model.weight.float()).max() < 0


@pytest.mark.parametrize("name", ATTACKS)
def test_a_gradient_that_is_not_finite_is_an_error(images: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=r"gradient of the model .* is not finite"):
        ATTACKS[name](Linear(size=float("inf")), images, LABELS, 0.25, norm="l2")


@pytest.mark.parametrize("bias", [0.0, 60.0, 80.0])
@pytest.mark.parametrize("patches", [1, 2])
def test_patch_attack_finds_the_patch_of_a_sure_model(images: Tensor, bias: float, patches: int) -> None:
    model = Linear(bias)
    found = patch_attack(model, images, LABELS, patch_size=4, patches=patches)
    heat = model.weight.detach().view(3, 2, 4, 2, 4).square().sum((0, 2, 4)).flatten()  # of the four patches
    changed = (found != images).any(1).unflatten(2, (2, 4)).unflatten(1, (2, 4)).any(4).any(2).flatten(1)
    expected = torch.zeros(4, dtype=torch.bool).index_fill_(0, heat.topk(patches).indices, True)
    assert torch.equal(changed, expected.expand(4, -1))
    assert ((found - images).flatten(1) @ model.weight < -0.5).all(), "white and black where the gradient says so"


def test_cw_reaches_the_border_of_a_sure_model(images: Tensor) -> None:
    weak = cw_l2(Linear(bias=0.05), images, LABELS, initial_const=1.0, search_steps=1, lr=1e-3)
    assert (Linear(bias=0.05)(weak).argmax(1) == 1).all()
    assert sizes(weak - images, "l2").max() < 0.6


def test_scaling_is_exact_and_per_image() -> None:
    values = torch.randn(len(SIZES) + 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([*SIZES, 0.0]).view(-1, 1, 1, 1)
    near_one, power = scaled(values * factors)
    torch.testing.assert_close(near_one.double(), (values * factors).double() * power.double(), atol=0, rtol=0)
    assert ((near_one.abs().amax((1, 2, 3)) >= 2**-23)[:-1]).all()
    torch.testing.assert_close(
        length(values * factors).double(),
        (values * factors).double().flatten(1).norm(dim=1).view(-1, 1, 1, 1),
        rtol=1e-6,
        atol=1e-44,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_gradients_are_divided_by_their_length_bit_for_bit(dtype: torch.dtype) -> None:
    gradient = torch.randn(8, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 1e-4
    norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, 1, 1, 1)
    assert torch.equal(length(gradient), norms)
    assert torch.equal(direction(gradient, "l2"), gradient / norms)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0])
def test_projection_shrinks_changes_that_are_too_large(size: float) -> None:
    clean = torch.zeros(2, 3, 4, 4)
    change = size * torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = project(clean + change, clean, size / 2, "l2")
    torch.testing.assert_close(sizes(found / size, "l2"), torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_start_at_the_end_of_the_interval_is_finite() -> None:
    victim = Victim(nn.Identity(), torch.full((2, 1, 2, 2), 0.5), torch.zeros(2))
    starts = Starts(victim, torch.Generator().manual_seed(0), 0, None)
    starts.uniform = lambda: torch.full((2, 1, 2, 2), -1.0)  # type: ignore[method-assign]  # what a generator may draw
    assert torch.isfinite(starts.point(0.1, "l2")).all()
