"""The exact nullspace in numbers: against numpy's ranks, projections written out, and float32's rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from fastnull.analysis.exact import dimensions, energy, leak, natural_pictures
from fastnull.models import create_model
from fastnull.nullspace import PatchNullspace
from fastnull.vit import NormalizedModel


def test_dimensions_are_numpy_s() -> None:
    names = ["vit_digits", "vit_tiny_patch16_224", "vit_base_patch16_224", "resnet18"]
    *rows, last = dimensions(names)
    for row in rows:
        weight = create_model(row["model"]).network.patch_embed.proj.weight.detach().flatten(1).double().numpy()
        assert row["rank"] == numpy.linalg.matrix_rank(weight)
        assert row["values"] == weight.shape[1] == row["rank"] + row["nullity"]
        assert row["reason"] is None
    assert last["rank"] is None
    assert "lets patches overlap" in last["reason"]


def test_energy_is_that_of_the_projection(images: Tensor) -> None:
    weight = torch.randn(20, 3, 4, 4)
    space = PatchNullspace.from_weight(weight)
    kernel = torch.from_numpy(numpy.linalg.svd(weight.flatten(1).double().numpy())[2][20:])  # [28, 48]
    patches = torch.nn.functional.unfold(images.double(), 4, stride=4).transpose(1, 2)  # [B, 16, 48]
    mine, random, white, _ = energy(space, {"noise": images})
    expected = float((patches @ kernel.T).square().sum() / patches.square().sum())
    assert mine["pixels"] == pytest.approx(expected, rel=1e-9)
    assert (mine["weights"], random["weights"], white["images"]) == ("model", "random", "white noise")
    assert mine["expected"] == random["expected"] == 28 / 48
    assert white["pixels"] == pytest.approx(28 / 48, abs=0.05)
    bordered = torch.nn.functional.pad(images, (0, 3, 0, 2), value=1.0)  # no patch holds the border
    assert energy(space, {"noise": bordered})[0]["pixels"] == pytest.approx(mine["pixels"])
    hidden = space.project(images)
    assert energy(space, {"hidden": hidden})[0]["pixels"] == pytest.approx(1)


def test_exact_noise_leaks_by_rounding_alone(vit: NormalizedModel, images: Tensor) -> None:
    rows = leak(vit, images, scales=(0.01, 1.0), dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16))
    found = {(row["dtype"], row["noise"], row["rms"]): row for row in rows}
    assert len(found) == 16
    limits = {"float64": 1e-13, "float32": 3e-6, "float16": 2e-2, "bfloat16": 1e-1}
    for dtype, limit in limits.items():
        for scale in (0.01, 1.0):
            exact, random = (found[dtype, noise, scale] for noise in ("exact", "random"))
            assert exact["tokens"] < limit
            assert exact["logits"] < limit
            assert exact["norm"] == pytest.approx(scale * (3 * 16 * 16) ** 0.5, rel=1e-3)
            assert random["norm"] == pytest.approx(exact["norm"], rel=1e-3)
        assert found[dtype, "random", 1.0]["logits"] > 100 * found[dtype, "exact", 1.0]["logits"] or dtype == "bfloat16"
    assert found["float32", "exact", 1.0]["agreement"] == 1
    assert found["bfloat16", "exact", 1.0]["logits"] > 100 * found["float32", "exact", 1.0]["logits"]
    assert next(vit.parameters()).dtype == torch.float32


def test_no_leak_without_a_nullspace(make_vit: Callable[..., NormalizedModel], images: Tensor) -> None:
    with pytest.raises(ValueError, match="has no nullspace"):
        leak(make_vit(embed_dim=64), images)


def test_natural_pictures() -> None:
    pytest.importorskip("skimage")
    pictures = natural_pictures((24, 16))
    assert pictures.shape == (13, 3, 24, 16)
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1
    assert natural_pictures((8, 8), 1).shape == (13, 1, 8, 8)
