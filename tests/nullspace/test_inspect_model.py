"""`inspect_model`: models of other libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastnull.compat import import_timm
from fastnull.models import create_model
from fastnull.nullspace.inspection import format_table, inspect_model, inspect_models
from fastnull.vit import HookedViT, NormalizedModel
from tests.vit.zoo import find


def test_same_row_as_by_name() -> None:
    (named,) = inspect_models(["vit_digits"])
    given = inspect_model(create_model("vit_digits"), "vit_digits")
    measured = ("largest", "smallest_kept", "weights")  # other random weights
    assert {key: given[key] for key in given if key not in measured} == {
        key: named[key] for key in named if key not in measured
    }
    assert given["weights"] == "given"


def test_transformers_by_folder_and_as_a_model(tmp_path: Path) -> None:
    model = find("transformers", "ViT")
    with torch.no_grad():
        model.vit.embeddings.patch_embeddings.projection.weight[10:] = 0
    model.save_pretrained(tmp_path / "vit")
    name, weights = f"transformers:{tmp_path / 'vit'}", tmp_path / "vit" / "model.safetensors"
    (row,) = inspect_models([name])
    assert (row["model"], row["rank"], row["nullity"], row["tokens"]) == (name, 32, 16, 16)
    assert row["weights"] == "random"
    (row,) = inspect_models([name], checkpoint=weights)
    assert (row["rank"], row["nullity"], row["weights"]) == (10, 38, str(weights))
    row = inspect_model(NormalizedModel(model, [0.5] * 3, [0.25] * 3))
    assert (row["model"], row["rank"], row["nullity"], row["tokens"]) == ("ViTForImageClassification", 10, 38, 16)
    assert (row["mean"], row["std"]) == ([0.5] * 3, [0.25] * 3)
    assert "ViTForImageClassification" in format_table([row])

    find("transformers", "DINOv3").backbone.config.save_pretrained(tmp_path / "dinov3")
    (row,) = inspect_models([f"transformers:{tmp_path / 'dinov3'}"])
    assert (row["rank"], row["nullity"], row["tokens"]) == (32, 16, 16)


def test_torchvision_and_open_clip_by_name() -> None:
    import_timm()
    pytest.importorskip("open_clip")
    rows = inspect_models(["torchvision:vit_b_32", "open_clip:ViT-B-32", "torchvision:resnet18"])
    assert [row["nullity"] for row in rows] == [2304, 2304, None]
    assert "ResNet has no patch embedding" in rows[2]["reason"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformers:no/such/folder/here", "transformers reads no configuration from 'no/such/folder/here'"),
        ("torchvision:vit_x", "torchvision knows no model named 'vit_x'; its ViTs are vit_b_16"),
        ("open_clip:ViT-B-33", "open_clip knows no model named 'ViT-B-33'; nearest are ViT-B-32"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    import_timm()
    pytest.importorskip(name.partition(":")[0])
    with pytest.raises(ValueError, match=message):
        inspect_models([name])
    with pytest.raises(ValueError, match="pretrained takes timm's weights"):
        inspect_models([name], pretrained=True)


def test_an_adapter_and_a_model_that_none_knows() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = create_model("vit_digits").network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.backbone(images)

    row = inspect_model(HookedViT(Mine(), patch="backbone.patch_embed", image_size=(16, 16)), "mine")
    assert (row["model"], row["nullity"], row["reason"]) == ("mine", 16, None)
    assert inspect_model(nn.Linear(3, 3))["reason"] is not None
    resnet = inspect_model(import_timm().create_model("resnet18"))
    assert "lets patches overlap" in resnet["reason"]
    assert resnet["nullity"] is None
