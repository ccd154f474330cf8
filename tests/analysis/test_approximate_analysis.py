"""Controls keep the norm, measurements agree with the synthesis, and finetuning does not change the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastnull.analysis.approximate import over_finetuning, over_lambda, over_norm
from fastnull.analysis.measure import controls, embedded_pairs, measure
from fastnull.encoder import FrozenEncoder
from fastnull.models import create_model
from fastnull.synthesis import SynthesisConfig, measure_influence, synthesize
from fastnull.vit import NormalizedModel


def test_controls_keep_the_norm() -> None:
    noise = torch.randn(16, 32)
    made = controls(noise, 3, seed=1)
    for rows in made.values():
        assert rows.shape == (3, 16, 32)
        torch.testing.assert_close(rows.flatten(1).norm(dim=1), noise.norm().expand(3), rtol=1e-5, atol=0)
    for row in made["permuted"]:
        assert not torch.equal(row, noise)
        assert torch.equal(row.flatten().sort().values, noise.flatten().sort().values)
    assert torch.equal(controls(noise, 3, seed=1)["random"], made["random"])


def test_measure_agrees_with_the_model(vit: NormalizedModel, images: Tensor) -> None:
    encoder = FrozenEncoder(vit, site="pixels")
    noises = 0.3 * torch.randn(2, 3, 16, 16)
    found, same = measure(encoder, noises, embedded_pairs(encoder, images, 3))
    with torch.no_grad():
        clean, noisy = vit(images), vit((images + noises[:, None]).clamp(0, 1).flatten(0, 1)).unflatten(0, (2, 8))
    assert found == pytest.approx(float((clean.softmax(-1) - noisy.softmax(-1)).square().sum(-1).mean()), rel=1e-4)
    assert same == pytest.approx(float((clean.argmax(-1) == noisy.argmax(-1)).float().mean()))


def test_over_norm_and_lambda(vit: NormalizedModel, images: Tensor) -> None:
    encoder = FrozenEncoder(vit)
    config = SynthesisConfig(limit=1.0, steps=30)
    noise = synthesize(encoder, [images], config)
    rows = over_norm(encoder, noise, images, (0.0, 1.0))
    assert [row["kind"] for row in rows] == ["learned"] * 2 + ["permuted"] * 2 + ["random"] * 2
    for still in rows[::2]:
        assert (still["influence"], still["agreement"], still["norm"]) == (0, 1, 0)
    learned, permuted, random = rows[1::2]
    assert learned["influence"] == pytest.approx(float(measure_influence(encoder, noise, images)[0]), rel=1e-4)
    assert permuted["norm"] == pytest.approx(learned["norm"], rel=1e-5) == random["norm"]
    assert learned["influence"] < 0.5 * min(permuted["influence"], random["influence"])

    found = over_lambda(encoder, [images], images, config, (0.01, 10.0))
    short, long = (row for row in found if row["kind"] == "learned")
    assert short["lambda"] < long["lambda"]
    assert short["norm"] < long["norm"]
    assert len(found) == 6


def test_over_finetuning() -> None:
    pytest.importorskip("sklearn")
    model = create_model("vit_digits", depth=1)
    before = copy.deepcopy(model.state_dict())
    rows = over_finetuning(model, "digits", SynthesisConfig(limit=0.5, rounds=1), epochs=2)
    assert [row["step"] for row in rows] == [1, rows[1]["step"]]
    for row in rows:
        assert row["norm"] > 0
        assert row["converged"] == (row["influence"] < 0.03)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
