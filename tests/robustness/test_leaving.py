"""Attacks that images leave when they are fooled, by autograd and by the frozen encoder, and evaluate() with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastnull.encoder import FrozenEncoder
from fastnull.robustness import apgd, evaluate, fgsm, mi_fgsm, pgd
from fastnull.robustness.measurements import pixel_encoder
from fastnull.vit import NormalizedModel
from tests.robustness.small_model import make_model
from tests.robustness.test_evaluate import QUICK, make_data

EPS = 2 / 255
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "pgd": pgd,
    "pgd_restarts": lambda *a, **k: pgd(*a, restarts=2, **k),
    "mi_fgsm": lambda *a, indices=None, **k: mi_fgsm(*a, **k),
    "apgd": lambda *a, **k: apgd(*a, steps=10, **k),
    "apgd_t": lambda *a, **k: apgd(*a, steps=10, loss="dlr_targeted", targets=3, restarts=2, **k),
}


class Watched(nn.Module):
    """Counts the images that pass through, and finds those that were misclassified at any point."""

    def __init__(self, inner: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.inner, self.labels = inner, labels
        self.images = 0
        self.fooled = torch.zeros(len(labels), dtype=torch.bool)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.inner(images)
        self.images += len(images)
        if len(images) == len(self.labels):
            self.fooled |= logits.argmax(1) != self.labels
        return logits


@pytest.mark.parametrize("name", ATTACKS)
def test_the_worst_iterate_with_less_work(name: str) -> None:
    model = make_model(dtype=torch.float64)  # float64: in another batch a gradient near zero may round to another sign
    images = torch.rand(64, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = model(images).argmax(1)
    usual = Watched(model, labels)
    last = ATTACKS[name](usual, images, labels, EPS)
    usual(last)
    leaving = Watched(model, labels)
    found = ATTACKS[name](leaving, images, labels, EPS, leave=True)
    fooled = model(found).argmax(1) != labels
    assert torch.equal(fooled, usual.fooled)
    assert 5 < fooled.sum() < 60, "the case must have both kinds"
    assert (found - images).abs().max() <= EPS * (1 + 1e-9)
    assert leaving.images < usual.images - 64
    if name in ("pgd", "mi_fgsm"):  # the others return the point of the largest loss
        torch.testing.assert_close(found[~fooled], last[~fooled], atol=1e-9, rtol=0)
    # whoever else is in the batch
    order = torch.tensor([40, 3, 17, 22, 5])
    part = ATTACKS[name](model, images[order], labels[order], EPS, leave=True, indices=order)
    torch.testing.assert_close(part, found[order], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_batch_that_is_fooled_at_once(name: str) -> None:
    model = make_model()
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    wrong = (model(images).argmax(1) + 1) % 7
    found = ATTACKS[name](model, images, wrong, 1 / 2550, leave=True)
    assert (found - images).abs().max() <= 1 / 2550 + 1e-6


@pytest.mark.parametrize("name", ATTACKS)
def test_a_float64_model_and_float32_images(name: str) -> None:
    model = make_model(dtype=torch.float64)
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = model(images.double()).argmax(1)
    found = ATTACKS[name](model, images, labels, EPS, leave=True)
    assert found.dtype == torch.float32
    assert (model(found.double()).argmax(1) != labels).any()


@pytest.mark.parametrize("name", ["fgsm", *ATTACKS])
def test_the_encoder_gives_the_flags_of_autograd(name: str, vit: NormalizedModel) -> None:
    attack = {"fgsm": lambda *a, leave=False, **k: fgsm(*a, **k), **ATTACKS}[name]
    encoder = FrozenEncoder(vit, site="pixels", backend="cpu")
    images = torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    labels = vit(images).argmax(1)
    calls = []
    vit.register_forward_hook(lambda *_: calls.append(1))
    mine = attack(vit, images, labels, EPS / 2, leave=True, encoder=encoder)
    assert len(calls) <= 2, "the model itself runs for logits alone"
    theirs = attack(vit, images, labels, EPS / 2, leave=True)
    flags = [vit(found).argmax(1) == labels for found in (mine, theirs)]
    assert 4 < flags[1].sum() < 44
    assert (flags[0] != flags[1]).sum() <= 1  # a tie in rounding


def test_only_a_float32_vit_is_attacked_through_the_encoder(vit: NormalizedModel, images: Tensor) -> None:
    labels = vit(images).argmax(1)
    settings: dict[str, Any] = {"suites": ("clean", "pgd", "apgd"), "eps": (EPS,), "progress": False}
    mine = evaluate(vit, (images, labels), **settings)
    assert mine["protocol"]["backend"] == ("autograd" if pixel_encoder(vit) is None else "FrozenEncoder, cpu")
    usual = evaluate(vit, (images, labels), final_iterate=True, **settings)
    assert usual["protocol"]["backend"] == "autograd"
    assert usual["results"]["clean"] == mine["results"]["clean"]
    assert usual["results"]["apgd"] == mine["results"]["apgd"]
    assert pixel_encoder(vit.double()) is None
    assert pixel_encoder(make_model()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert pixel_encoder(vit.float()) is None


def test_evaluate_counts_images_that_were_right_at_every_point(tmp_path: Path) -> None:
    images, labels = make_data()
    net = make_model(dtype=torch.float64)
    settings = {**QUICK, "suites": ("pgd", "cw"), "eps": (EPS,), "steps": 7}
    out = tmp_path / "result.json"
    record = evaluate(net, (images, labels), out=out, **settings)
    watched = Watched(net, labels)
    watched(images)
    watched(pgd(watched, images, labels, EPS, steps=7))
    assert record["results"]["pgd"]["2/255"] == pytest.approx(100 * (~watched.fooled).double().mean().item())
    assert "worst iterate" in record["protocol"]["attacked"]
    usual = evaluate(net, (images, labels), final_iterate=True, **settings)
    assert usual["results"]["pgd"]["2/255"] >= record["results"]["pgd"]["2/255"]
    assert evaluate(net, (images, labels), batch_size=7, **settings)["results"] == record["results"]
    # a file of version 0.1 is of another protocol
    old = json.loads(out.read_text())
    old["protocol"]["attacked"] = "all images"
    out.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"another protocol: attacked \('all images' there"):
        evaluate(net, (images, labels), out=out, **settings)
