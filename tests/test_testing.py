"""The comparators themselves: what must pass and what must fail."""

from __future__ import annotations

import pytest
import torch

from fastnull import testing
from fastnull.ops import common


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 reference and what float32 rounding makes of it."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    return reference, reference.float()


def test_rounding_passes(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    reference, baseline = case
    testing.assert_within_budget(baseline, reference, baseline)
    testing.assert_gradient_close(baseline, reference, baseline)
    # Another rounding, not the baseline's own: up to an ulp further away.
    other = (reference * (1 + 5e-8)).float()
    testing.assert_gradient_close(other, reference, baseline)


def test_bfloat16_rounding_passes(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    reference, _ = case
    baseline = reference.to(torch.bfloat16)
    testing.assert_gradient_close(reference.float().to(torch.bfloat16), reference, baseline)


def spoil_one_row(x: torch.Tensor) -> torch.Tensor:
    x[7] = x[6]
    return x


WRONG = {
    "bias": lambda x: x + 3e-6,
    "flipped sign": lambda x: -x,
    "scaled": lambda x: x * 1.001,
    "zeros": torch.zeros_like,
    "one bad row": spoil_one_row,
    "one bad element": lambda x: x.index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(9.0)),
    "NaN": lambda x: x.index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(float("nan"))),
    "infinity": lambda x: x.index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(float("inf"))),
    "shape": lambda x: x[:-1],
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_results_fail(how: str, case: tuple[torch.Tensor, torch.Tensor]) -> None:
    reference, baseline = case
    wrong = WRONG[how](baseline.clone())
    with pytest.raises(AssertionError):
        testing.assert_within_budget(wrong, reference, baseline)
    with pytest.raises(AssertionError):
        testing.assert_gradient_close(wrong, reference, baseline)


def test_small_bias_fails_as_a_gradient_only(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A bias below the elementwise budget is invisible there, and visible in the mean."""
    reference, baseline = case
    biased = (reference + 0.8 * testing.error_budget(reference, baseline)).float()
    testing.assert_within_budget(biased, reference, baseline)
    with pytest.raises(AssertionError):
        testing.assert_gradient_close(biased, reference, baseline)


def test_reference_must_be_float64(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, baseline = case
    with pytest.raises(AssertionError, match="float64"):
        testing.assert_within_budget(baseline, baseline, baseline)


def test_poison_reaches_what_is_not_written() -> None:
    with testing.poisoned():
        x = common.empty((3, 2), dtype=torch.float32, device=torch.device("cpu"))
        code = common.empty((3,), dtype=torch.uint8, device=torch.device("cpu"))
    assert x.isnan().all()
    assert (code == 0xEE).all()
    assert common._allocate is torch.empty


def test_strided_inputs_are_real_slices_with_poison_around() -> None:
    x = testing.randn((3, 5, 7), torch.bfloat16, torch.Generator().manual_seed(0))
    assert x.isfinite().all()
    assert not x.is_contiguous()
    assert x.stride(-1) == 1
    around = torch.as_strided(x, (8,), (1,), x.storage_offset() - 1)
    assert around[0].isnan()
    assert around[1:].isfinite().all()
