"""`inspect`: rows from shapes, from weights, and reasons why nothing can be measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastnull.models import create_model, save_checkpoint
from fastnull.nullspace import inspection
from fastnull.nullspace.inspection import format_table, inspect_models


def test_rows_of_known_models() -> None:
    names = ["vit_digits", "vit_base_patch32_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"]
    digits, base, eva, swin = inspect_models(names)
    assert [row["model"] for row in (digits, base, eva, swin)] == names
    assert {row["reason"] for row in (digits, base, eva, swin)} == {None}
    assert (base["values"], base["width"], base["rank"], base["nullity"]) == (3072, 768, 768, 2304)
    assert (base["fraction"], base["per_channel_nullity"], base["patch"], base["tokens"]) == (0.75, 768, (32, 32), 49)
    assert (eva["nullity"], eva["per_channel_nullity"], eva["tokens"], eva["image_size"]) == (396, 12, 256, (224, 224))
    assert (swin["nullity"], swin["fraction"], swin["tokens"]) == (0, 0, 3136)
    assert (digits["nullity"], digits["values"], digits["channels"], digits["tokens"]) == (16, 48, 3, 16)
    assert swin["mean"] == [0.485, 0.456, 0.406]
    assert base["tolerance"] == 2**-23
    assert 0.1 < base["smallest_kept"] < 1
    assert base["largest"] > 0
    assert base["weights"] == "random"


def test_a_large_model_is_never_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def remember(*args: object, **options: object) -> torch.nn.Module:
        seen.append(create_model(*args, **options))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(inspection, "create_model", remember)
    (row,) = inspect_models(["vit_giant_patch14_224"])  # 1e9 parameters
    assert (row["values"], row["width"], row["nullity"]) == (588, 1408, 0)
    allocated = {name for name, parameter in seen[0].named_parameters() if not parameter.is_meta}
    assert allocated == {"network.patch_embed.proj.weight", "network.patch_embed.proj.bias"}


def test_random_rows_repeat_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert inspect_models(["vit_digits"]) == inspect_models(["vit_digits"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_patches_says_why() -> None:
    rows = inspect_models(["resnet18", "vit_digits", "crossvit_9_240"])
    assert "lets patches overlap" in rows[0]["reason"]
    assert "no patch embedding" in rows[2]["reason"]
    assert rows[0]["nullity"] is None
    table = format_table(rows).splitlines()
    assert len(table) == 3 + 1 + 2
    assert table[-2].startswith("resnet18: ResNet has no exact patch nullspace")
    assert format_table([rows[0]]).startswith("resnet18: ")


def test_table_is_aligned_markdown() -> None:
    table = format_table(inspect_models(["vit_digits", "vit_tiny_patch16_224"])).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[0].split("|")[1].strip() == "model"
    assert set(table[1]) == set("|-: ")
    cells = [cell.strip() for cell in table[3].split("|")]
    assert cells[1:10] == ["vit_tiny_patch16_224", "16x16", "196", "768", "192", "192", "576", "75.0 %", "192"]
    assert format_table([]) == ""


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "five.safetensors"
    model = create_model("vit_digits", num_classes=5)  # another head does not matter here
    with torch.no_grad():
        model.network.patch_embed.proj.weight[10:] = 0
    save_checkpoint(model, path)
    (row,) = inspect_models(["vit_digits"], checkpoint=path)
    assert (row["rank"], row["nullity"], row["weights"]) == (10, 38, str(path))
    (strict,) = inspect_models(["vit_digits"], checkpoint=path, tolerance=0.99)
    assert strict["rank"] < 10
    assert strict["tolerance"] == 0.99


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"patch_embed.proj.weight": torch.zeros(16, 3, 4, 4)}, path)
    with pytest.raises(ValueError, match=r"must have shape \[32, 3, 4, 4\]; the file holds shape \[16, 3, 4, 4\]"):
        inspect_models(["vit_digits"], checkpoint=path)
    save_file({"head.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="the file holds nothing"):
        inspect_models(["vit_digits"], checkpoint=path)
    save_file({"patch_embed.proj.weight": torch.full((32, 3, 4, 4), math.nan)}, path)
    with pytest.raises(ValueError, match="must be finite"):
        inspect_models(["vit_digits"], checkpoint=path)


def test_bad_requests() -> None:
    with pytest.raises(TypeError, match="names must be a list"):
        inspect_models("vit_digits")
    with pytest.raises(ValueError, match="Did you mean 'vit_tiny_patch16_224'"):
        inspect_models(["vit_tiny_patch16_225"])
    with pytest.raises(ValueError, match="checkpoint belongs to one model; got 2 names"):
        inspect_models(["vit_digits", "resnet18"], checkpoint="x.pt")
    with pytest.raises(ValueError, match="exclude each other"):
        inspect_models(["vit_digits"], pretrained=True, checkpoint="x.pt")
