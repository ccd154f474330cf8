"""Loss, cotangent and influence from a pair of logits, every CPU backend against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastnull import ops, testing
from fastnull.ops.noise_objective import KINDS
from tests.ops import checks
from tests.ops.checks import objective_by_autograd

PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
# K: 1000 = ImageNet, tail of 8 on AVX-512; 10 = less than a vector there; 1 = degenerate (softmax constant).
SHAPES = [(16, 1000), (5, 10), (3, 1)]


def logits(B: int, K: int, clean: torch.dtype, noisy: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * testing.randn((B, K), clean, g), 3 * testing.randn((B, K), noisy, g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(
    backend: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], kind: str
) -> None:
    checks.noise_objective(*logits(*shape, *dtypes), kind)


def test_float64_stays_float64() -> None:
    clean, noisy = logits(4, 7, torch.float64, torch.float64)
    for kind in KINDS:
        expected = objective_by_autograd(clean, noisy, kind)
        for a, b in zip(ops.noise_objective(clean, noisy, kind)[:3], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_share_clean_logits(backend: str, kind: str) -> None:
    """Three noises over the same five images: means and cotangents as for each noise by itself."""
    clean, _ = logits(5, 10, torch.float32, torch.float32)
    noisy, _ = logits(15, 10, torch.float32, torch.float32, seed=1)
    together = ops.noise_objective(clean, noisy, kind, groups=3)
    for m in range(3):
        rows = slice(5 * m, 5 * m + 5)
        alone = ops.noise_objective(clean, noisy[rows], kind)
        torch.testing.assert_close(together.mean_loss[m], alone.mean_loss[0])
        torch.testing.assert_close(together.mean_influence[m], alone.mean_influence[0])
        assert together.cotangent[rows].equal(alone.cotangent)
    each = ops.noise_objective(clean, noisy, kind, reduction="none", groups=3)
    torch.testing.assert_close(each.cotangent, together.cotangent * 5)
    assert each.loss.equal(together.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_means_no_loss_and_a_finite_cotangent(backend: str, kind: str) -> None:
    clean, _ = logits(4, 19, torch.float32, torch.float32)
    with testing.poisoned():
        result = ops.noise_objective(clean, clean.clone(), kind)
    for value in result:
        assert value.equal(torch.zeros_like(value))


def test_influence_bounds_and_invariance(backend: str) -> None:
    """0 <= influence <= 2; a constant added to the noisy logits changes the loss and not the influence."""
    clean, noisy = logits(6, 33, torch.float32, torch.float32)
    opposite_clean, opposite_noisy = torch.zeros(1, 33), torch.zeros(1, 33)
    opposite_clean[0, 0], opposite_noisy[0, 32] = 1000.0, 1000.0  # large logits must not overflow
    plain, shifted = ops.noise_objective(clean, noisy), ops.noise_objective(clean, noisy + 5)
    extreme = ops.noise_objective(opposite_clean, opposite_noisy)
    assert (plain.influence >= 0).all()
    assert (plain.influence <= 2).all()
    torch.testing.assert_close(plain.influence, shifted.influence, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(plain.loss, shifted.loss)
    torch.testing.assert_close(extreme.influence, torch.tensor([2.0]))


def test_nan_stays_in_its_image(backend: str) -> None:
    clean, noisy = logits(4, 19, torch.float32, torch.float32)
    noisy[2, 18] = float("nan")
    for kind in KINDS:
        result = ops.noise_objective(clean, noisy, kind)
        expected = torch.tensor([False, False, True, False])
        assert result.loss.isnan().equal(expected)
        assert result.influence.isnan().equal(expected)
        assert result.cotangent.isnan().any(1).equal(expected)
        assert result.mean_influence.isnan().all()


def test_empty_batch(backend: str) -> None:
    result = ops.noise_objective(torch.empty(0, 10), torch.empty(0, 10))
    assert result.loss.shape == result.influence.shape == (0,)
    assert result.cotangent.shape == (0, 10)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="kind must be one of 'l2', 'l2_squared'"):
        ops.noise_objective(x, x, "l3")
    with pytest.raises(ValueError, match="must have shape"):
        ops.noise_objective(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="multiple"):
        ops.noise_objective(x, torch.zeros(6, 3))
    with pytest.raises(ValueError, match="groups must divide the 4 rows"):
        ops.noise_objective(x, x, groups=3)
    for name, value in itertools.product(("groups", "batch"), (0, -1, -4)):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got {value}"):
            ops.noise_objective(x, x, **{name: value})
    for name, wrong in itertools.product(("groups", "batch"), (1.0, "2", True)):
        with pytest.raises(TypeError, match=f"{name} must be an integer; got"):
            ops.noise_objective(x, x, **{name: wrong})


def test_opcheck(backend: str) -> None:
    clean, noisy = logits(4, 6, torch.float32, torch.float32)
    outputs = (torch.empty(4), torch.empty(4, 6), torch.empty(4))
    for squared in (False, True):
        testing.opcheck("noise_objective_out", (clean, noisy, squared, 0.5, *outputs))
