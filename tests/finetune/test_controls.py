"""TRADES against its formula, and the attack of both controls; the rest is tested by the runs that use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastnull.finetune.controls import AdversarialTraining, Stopwatch, Trades
from fastnull.rng import Place, generator
from fastnull.robustness import pgd
from fastnull.vit import NormalizedModel

EPS = 8 / 255


def make_trades(model: NormalizedModel, **changes: float) -> Trades:
    settings = {"beta": 6.0, "eps": EPS, "steps": 5, "step_size": 2 / 255, "seed": 0}
    return Trades(model, **{**settings, **changes}, watch=Stopwatch(torch.device("cpu")))


def divergence(model: NormalizedModel, images: Tensor, attacked: Tensor) -> Tensor:
    p, q = model(images).softmax(1), model(attacked).softmax(1)
    return (p * (p / q).log()).sum(1)  # [B]


def test_loss_is_the_formula(vit: NormalizedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(8)
    trades = make_trades(vit)
    attacked = (images + 0.01 * torch.randn(images.shape)).clamp(0, 1)
    monkeypatch.setattr(trades, "attack", lambda *_: attacked)
    loss, logits = trades.loss(images, labels, F.cross_entropy)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in vit.parameters()]
    vit.zero_grad()
    expected = F.cross_entropy(vit(images), labels) + 6 * divergence(vit, images, attacked).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, vit(images))
    expected.backward()  # through both views
    for gradient, parameter in zip(gradients, vit.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3)


def test_attack_raises_the_divergence_within_the_ball(vit: NormalizedModel, images: Tensor) -> None:
    trades = make_trades(vit.train())
    attacked = trades.attack(images, trades._probabilities(images))
    assert vit.training
    vit.eval()
    assert (attacked - images).abs().max() <= EPS + 1e-6
    random = (images + EPS * (2 * torch.rand(images.shape) - 1)).clamp(0, 1)
    assert (divergence(vit, images, attacked) > 2 * divergence(vit, images, random)).all()
    assert float(trades.stats["norm"]) == pytest.approx(float((attacked - images).flatten(1).norm(dim=1).mean()))


@pytest.mark.parametrize(("steps", "step_size"), [(1, 10 / 255), (3, 1 / 255)])
def test_attack_takes_the_steps_it_was_asked_for(
    vit: NormalizedModel, images: Tensor, steps: int, step_size: float
) -> None:
    labels = torch.arange(8)
    madry = AdversarialTraining(
        vit, eps=EPS, steps=steps, step_size=step_size, seed=3, watch=Stopwatch(torch.device("cpu"))
    )
    seed = generator(3, 0, 1).initial_seed()
    expected = pgd(vit, images, labels, EPS, steps=steps, step_size=step_size, seed=seed)
    assert torch.equal(madry.attack(images, labels), expected)


def test_a_fraction_of_one_view_is_attacked(vit: NormalizedModel, images: Tensor) -> None:
    labels = torch.arange(8)
    settings: dict[str, Any] = {"eps": EPS, "steps": 2, "step_size": 4 / 255, "seed": 3}
    madry = AdversarialTraining(vit, **settings, watch=Stopwatch(torch.device("cpu")), fraction=0.5)
    loss, logits = madry.loss(images, labels, F.cross_entropy)
    whole = AdversarialTraining(vit, **settings, watch=Stopwatch(torch.device("cpu"))).attack(images, labels)
    seen = images.clone()
    seen[1::2] = whole[1::2]  # every image gets the attack that it would get if all did
    torch.testing.assert_close(logits, vit(seen))
    torch.testing.assert_close(loss, F.cross_entropy(vit(seen), labels))


def test_labels_take_no_part_in_the_attack(
    vit: NormalizedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recording(attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(images: Tensor, labels: Tensor, place: Place | None) -> Tensor:
            seen.append(attack(images, labels, place))
            return seen[-1]

        return call

    for labels in (torch.arange(8), torch.zeros(8, dtype=torch.long)):
        trades = make_trades(vit)
        monkeypatch.setattr(trades, "attack", recording(trades.attack))
        trades.loss(images, labels, F.cross_entropy)
    assert torch.equal(seen[0], seen[1])
