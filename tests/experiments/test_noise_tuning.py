from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnull.cli import main
from fastnull.encoder import FrozenEncoder
from fastnull.experiments.noise_tuning import MODES, format_tried, try_settings
from fastnull.synthesis import SynthesisConfig, measure_influence, synthesize
from fastnull.vit import NormalizedModel


@pytest.mark.parametrize("site", ["patch", "pixels"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_what_synthesis_gives(vit: NormalizedModel, images: Tensor, mode: str, site: str) -> None:
    limits, eps = (0.01, 0.05), (0.01, 0.1)
    rows = try_settings(vit, images, mode=mode, site=site, limits=limits, eps=eps, steps=4, seed=3)
    assert [(row.limit, row.eps) for row in rows] == [(a, b) for a in limits for b in (None, *eps)]
    by = {(row.limit, row.eps): row for row in rows}
    smooth = SynthesisConfig.recommended(mode, site).smooth_limit  # it stays as it is
    assert by[0.05, None].norm > (1 if smooth else 3) * by[0.01, None].norm
    learned, judged = images.chunk(2) if mode == "universal" else (images, images)
    asked = {"limit": 0.05, "eps": 0.1, "steps": 4}
    config = SynthesisConfig.recommended(mode, site, seed=3, **asked)
    noise = synthesize(vit, [learned], config, check=judged if mode == "universal" else None)
    row = by[0.05, 0.1]
    assert row.norm == pytest.approx(float(noise.norm.mean()))
    if mode == "universal":
        assert row.influence == pytest.approx(float(measure_influence(vit, noise, [judged])), rel=1e-4)
    else:
        assert row.influence == pytest.approx(float(noise.influence.mean()), rel=1e-4)
    assert row.converged == pytest.approx(float(noise.converged.float().mean()))
    assert 0 <= row.agreement <= 1
    again = try_settings(vit, images, mode=mode, site=site, limits=limits, eps=eps, steps=4, seed=3)
    assert [(a.norm, a.influence) for a in again] == [(b.norm, b.influence) for b in rows]


def test_defaults_follow_mode_and_site(vit: NormalizedModel, images: Tensor) -> None:
    rows = try_settings(FrozenEncoder(vit, site="pixels"), images, eps=(0.1,))
    assert [round(row.limit * 255, 6) for row in rows if row.eps is None] == [2, 4, 8, 16, 32]
    assert "limit /255" in format_tried(rows, "pixels")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "random"}, "mode must be one of"),
        ({"limits": []}, "limits must hold at least one number"),
        ({"eps": [0.0]}, "eps must be > 0"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"steps": -1}, "steps must be >= 1"),
    ],
)
def test_bad_settings(vit: NormalizedModel, images: Tensor, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        try_settings(vit, images, **changes)


def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    words = ["--model", "vit_digits", "--data", "digits", "--images", "8", "--limits", "0.1", "--eps", "0.1", "0.5"]
    torch.manual_seed(0)
    assert main(["tune", *words, "--out", str(tmp_path / "tune")]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 6
    record = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert [row["eps"] for row in record["rows"]] == [None, 0.1, 0.5]
    assert record["settings"]["images"] == 8
    assert record["settings"]["subset"] == "drawn evenly over the classes by the seed"
    assert record["provenance"]["torch"]
    assert (tmp_path / "tune" / "tune.png").stat().st_size > 1000
