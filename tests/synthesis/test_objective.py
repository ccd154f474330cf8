"""Distances, their gradients and the influence, against autograd and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastnull.ops.noise_objective import KINDS
from fastnull.synthesis.objective import influence, noise_objective, prediction_gradient


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_autograds(kind: str) -> None:
    clean = torch.randn(5, 7, dtype=torch.float64)
    noisy = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    length = (noisy - clean).norm(dim=-1)
    (expected,) = torch.autograd.grad((length if kind == "l2" else length**2).sum(), noisy)
    judged = noise_objective(clean, noisy, kind, reduction="none")
    torch.testing.assert_close(judged.cotangent, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(judged.influence, influence(clean, noisy.detach()), rtol=1e-12, atol=0)


def test_gradient_of_the_prediction_is_autograds() -> None:
    clean = torch.randn(5, 7, dtype=torch.float64)
    noisy = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(noisy, clean.argmax(1), reduction="sum")
    (expected,) = torch.autograd.grad(loss, noisy)
    gradient, seen = prediction_gradient(clean, noisy.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(seen, influence(clean, noisy.detach()), rtol=0, atol=0)
    assert prediction_gradient(clean.bfloat16(), noisy.detach().bfloat16())[0].dtype == torch.float32


def test_values_by_hand() -> None:
    clean, noisy = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert noise_objective(clean, noisy, "l2").loss.item() == 5
    assert noise_objective(clean, noisy, "l2_squared").loss.item() == 25
    # softmax of (log 3, 0) is (3/4, 1/4), against (1/2, 1/2): 2 * (1/4)^2
    assert influence(clean, torch.tensor([[math.log(3), 0.0]])).item() == pytest.approx(1 / 8)


def test_no_difference_has_no_gradient() -> None:
    logits = torch.randn(3, 4)
    for kind in KINDS:
        judged = noise_objective(logits, logits, kind)
        assert not judged.loss.any()
        assert not judged.cotangent.any()
    assert not influence(logits, logits).any()


def test_influence_ignores_a_shift_and_is_at_most_two() -> None:
    logits = torch.randn(3, 4)
    assert influence(logits, logits + 5).max() < 1e-12
    certain = torch.tensor([[100.0, 0.0]])
    assert influence(certain, certain.flip(-1)).item() == pytest.approx(2)


def test_bfloat16_is_widened_and_nan_stays_visible() -> None:
    clean = torch.randn(2, 4, dtype=torch.bfloat16)
    assert influence(clean, clean + 1).dtype == torch.float32
    clean[0, 0] = math.nan
    assert influence(clean, clean).isnan().tolist() == [True, False]
