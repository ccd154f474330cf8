"""AutoAttack: what it runs with few classes, and the sizes of images that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastnull.robustness import autoattack, evaluate, pgd
from fastnull.robustness.attacks.auto import VERSIONS, attacks_for

EPS = {"linf": 0.02, "l2": 0.5}


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square asks 20 times, not 5000."""
    library = pytest.importorskip("pyautoattack")
    whole = library.AutoAttack._set_version

    def quickly(attack: Any, version: str = "standard") -> None:
        whole(attack, version)
        attack.square.n_queries = 20

    monkeypatch.setattr(library.AutoAttack, "_set_version", quickly)


def make_linear(classes: int, height: int = 16, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    hidden = nn.Linear(3 * height * width, 16)
    return nn.Sequential(nn.Flatten(), hidden, nn.GELU(), nn.Linear(16, classes))


@pytest.mark.parametrize(
    ("classes", "version", "expected"),
    [
        (2, "standard", ("apgd-ce", "fab-t", "square")),
        (3, "standard", ("apgd-ce", "apgd-dlr", "fab-t", "square")),
        (2, "plus", ("apgd-ce", "fab", "square", "fab-t")),
        (3, "plus", ("apgd-ce", "apgd-dlr", "fab", "square", "fab-t")),
        (2, "rand", ("apgd-ce",)),
        (3, "rand", ("apgd-ce", "apgd-dlr")),
    ],
)
def test_few_classes_have_the_attacks_that_they_allow(classes: int, version: str, expected: tuple[str, ...]) -> None:
    assert attacks_for(classes, version) == expected
    assert attacks_for(4, version) == attacks_for(1000, version) == VERSIONS[version]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes: int, norm: str) -> None:
    model = make_linear(classes)
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    before = torch.get_rng_state()
    found = autoattack(model, images, labels, EPS[norm], norm=norm)
    assert torch.equal(before, torch.get_rng_state())
    fooled = model(found).argmax(1) != labels
    assert fooled.sum() >= (model(pgd(model, images, labels, EPS[norm], norm=norm)).argmax(1) != labels).sum()
    assert 0 < fooled.sum() < 16, "some image must reach every attack"
    change = (found - images).flatten(1)
    assert (change.norm(dim=1) if norm == "l2" else change.abs().amax(1)).max() <= EPS[norm] * (1 + 1e-6)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classes of the model under autoattack must be >= 2; got 1"):
        autoattack(make_linear(1), torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.long), 0.1)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_protocol_says_which_attacks_ran(classes: int) -> None:
    model = make_linear(classes)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"suites": ("autoattack",), "eps": (0.2,), "progress": False}
    record = evaluate(model, (images, model(images).argmax(1)), **settings)
    assert record["protocol"]["autoattack"] == list(attacks_for(classes))
    assert record["results"]["autoattack"]["51/255"] < 100
    settings["suites"] = ("clean",)
    assert evaluate(model, (images, model(images).argmax(1)), **settings)["protocol"]["autoattack"] is None


@pytest.mark.parametrize(("height", "width"), [(24, 16), (14, 14), (4, 4), (224, 264)])
def test_l2_refuses_sizes_that_it_cannot_tile_before_it_attacks(height: int, width: int) -> None:
    model = make_linear(3, height, width)
    images = torch.rand(1, 3, height, width)
    with pytest.raises(ValueError, match=f"in l2 does not support images of {height}x{width}.*use norm linf"):
        autoattack(model, images, model(images).argmax(1), 0.5, norm="l2")


@pytest.mark.parametrize(("height", "width", "norm"), [(16, 24, "l2"), (16, 24, "linf"), (24, 16, "linf")])
def test_images_that_are_not_square(height: int, width: int, norm: str) -> None:
    model = make_linear(3, height, width)
    images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    found = autoattack(model, images, labels, 10 * EPS[norm], norm=norm)
    assert (model(found).argmax(1) != labels).all()
