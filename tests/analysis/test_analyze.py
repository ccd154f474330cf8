"""`analyze`: its files contain the numbers and their protocol, and bad requests give one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from fastnull.analysis import ANALYSES, AnalysisSettings, analyze, small_model, write_analysis
from fastnull.cli import parser as cli
from fastnull.models import create_model, save_checkpoint
from fastnull.vit import NormalizedModel
from tests.commands import refused

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

QUICK = [
    "--data", "digits", "--device", "cpu", "--images", "24", "--batch-size", "12", "--steps", "4", "--rank", "6",
    "--spectrum-images", "3", "--finetune-epochs", "1", "--families", "vit_digits", "resnet18",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of small models."""
    folder = tmp_path_factory.mktemp("models")
    for name, depth in (("a", 1), ("b", 2)):
        torch.manual_seed(depth)
        save_checkpoint(create_model("vit_digits", depth=depth), folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def test_every_analysis_writes_its_files(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["analyze", *ANALYSES, "--out", str(tmp_path), "--model", str(files[0]), "--others", str(files[1]), *QUICK]
    assert cli.main(words) == 0
    output = capsys.readouterr().out
    for name in ANALYSES:
        assert f"{name}: " in output
        found = json.loads((tmp_path / f"{name}.json").read_text())
        protocol = found["protocol"]
        assert protocol["settings"]["images"] == 24
        assert protocol["images"]["test"] == 24
        assert (protocol["data"], protocol["model"]) == ("digits", str(files[0]))
        assert {"commit", "torch", "device_name", "dtype", "backend", "seed"} <= set(protocol["provenance"])
        for table, rows in found["tables"].items():
            with open(tmp_path / f"{name}-{table}.csv", newline="") as file:
                lines = list(csv.DictReader(file))
            assert len(lines) == len(rows) > 0
            for line, row in zip(lines, rows, strict=True):
                assert line == {key: "" if value is None else str(value) for key, value in row.items()}
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")

    assert cli.main(words) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert cli.main(["analyze", "spectrum", "--overwrite", *words[len(ANALYSES) + 1 :]]) == 0


def test_the_small_model_repeats() -> None:
    one, two = (small_model("digits", seed=3, epochs=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not one.training
    with pytest.raises(ValueError, match="data must be one of 'digits', 'photos'"):
        small_model("mnist")


def test_a_model_without_a_nullspace_has_dimensions_alone(tmp_path: Path) -> None:
    model = create_model("vit_digits", embed_dim=64, depth=1).eval()
    images = torch.rand(4, 3, 16, 16)
    found = analyze("exact", model, images, images, AnalysisSettings(families=("vit_digits",)))
    assert found.tables["energy"] == found.tables["leak"] == []
    assert "(width 64) has none" in found.summary[1]
    paths = write_analysis(found, tmp_path)
    assert all(path.exists() for path in paths)


def test_data_in_memory_cannot_be_finetuned_on(vit: NormalizedModel) -> None:
    images = torch.rand(6, 3, 16, 16)
    found = analyze("approximate", vit, images, images, AnalysisSettings(steps=2))
    assert found.tables["finetuning"] == []
    assert len(found.tables["synthesis"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["analyze", "exect", "--out", "x"], "invalid choice"),
        (["analyze", "exact"], "--out"),
        (["analyze", "exact", "--out", "x", "--images", "1"], "images must be >= 2"),
        (["analyze", "exact", "--out", "x", "--data", "/no/where"], "data must be one of 'digits', 'photos'"),
        (["analyze", "transfer", "--out", "x", "--model", "vit_digits"], "needs --others"),
        (["analyze", "transfer", "--out", "x", "--others", "vit_digits"], "--others needs --model"),
        (["analyze", "exact", "--out", "x", "--checkpoint", "w.pth"], "--checkpoint needs --model"),
        (["analyze", "spectrum", "--out", "x", "--rank", "0"], "rank must be >= 1"),
    ],
)
def test_bad_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words)


def test_bad_arguments(vit: NormalizedModel) -> None:
    images = torch.rand(4, 3, 16, 16)
    with pytest.raises(ValueError, match="Did you mean 'exact'"):
        analyze("exat", vit, images, images)
    with pytest.raises(ValueError, match="train images"):
        analyze("exact", vit, images - 1, images)
    with pytest.raises(ValueError, match="transfer needs two models or more"):
        analyze("transfer", vit, images, images)
    with pytest.raises(ValueError, match="families must name"):
        AnalysisSettings(families=())
