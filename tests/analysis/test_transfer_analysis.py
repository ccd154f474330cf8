"""Transfer: to itself it is the influence of the synthesis, and unsuitable pairs have a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastnull.analysis.transfer import transfer
from fastnull.encoder import FrozenEncoder
from fastnull.synthesis import SynthesisConfig, measure_influence, synthesize
from fastnull.vit import NormalizedModel


def test_matrix(make_vit: Callable[..., NormalizedModel], images: Tensor) -> None:
    first, second = make_vit(), make_vit(depth=1)
    models = {"first": first, "second": second, "wide": make_vit(embed_dim=64)}
    configs = {
        "token": SynthesisConfig(limit=1.0, steps=30),
        "pixel": SynthesisConfig(site="pixels", limit=0.2, steps=2),
    }
    rows = transfer(models, [images], images, configs)
    cells = {(row["kind"], row["source"], row["target"]): row for row in rows}
    assert len(cells) == 27

    noise = synthesize(first, [images], configs["token"])
    for name in ("first", "second"):
        expected = float(measure_influence(FrozenEncoder(models[name]), noise, images)[0])
        cell = cells["token", "first", name]
        assert cell["influence"] == pytest.approx(expected, rel=1e-4)
        assert cell["ratio"] == pytest.approx(cell["influence"] / cell["control"])
        assert cell["norm"] == pytest.approx(float(noise.norm[0]), rel=1e-5)
    assert cells["token", "first", "first"]["ratio"] < 0.5

    own, other = cells["exact", "first", "first"], cells["exact", "first", "second"]
    assert own["influence"] < 1e-9
    assert own["agreement"] == 1
    assert other["influence"] > 1e-6
    assert own["norm"] == pytest.approx(0.1 * (3 * 16 * 16) ** 0.5, rel=1e-4)

    assert cells["token", "first", "wide"]["influence"] is None
    assert "the target's patch is [16, 64]" in cells["token", "first", "wide"]["reason"]
    assert cells["pixel", "first", "wide"]["influence"] > 0
    assert "has no nullspace" in cells["exact", "wide", "first"]["reason"]


def test_one_model_is_too_few(vit: NormalizedModel, images: Tensor) -> None:
    with pytest.raises(ValueError, match="needs two models or more; got 1"):
        transfer({"one": vit}, [images], images, {})


def test_a_model_without_tokens(vit: NormalizedModel, images: Tensor) -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 16), torch.nn.Flatten())
    configs = {
        "pixel": SynthesisConfig(site="pixels", limit=0.1),
        "token": SynthesisConfig(limit=0.5, steps=2),
    }
    rows = transfer({"vit": vit, "plain": plain}, [images], images, configs)
    found = {(row["kind"], row["source"], row["target"]): row for row in rows}
    assert found["pixel", "vit", "plain"]["influence"] > 0
    assert found["pixel", "plain", "vit"]["influence"] > 0
    assert found["token", "vit", "vit"]["influence"] > 0
    for source, target in (("vit", "plain"), ("plain", "vit"), ("plain", "plain")):
        assert "no adapter splits Sequential" in found["token", source, target]["reason"]
