"""A digest of a data set: the same for the same images, another for others, and nothing is decoded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

import fastnull.data.digest
from fastnull.compat import import_timm
from fastnull.data import ImageFiles, ImageFolder, Samples
from fastnull.data.digest import cheap_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of files that are no images."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"no image")
    return tmp_path / "data"


def _ours(folder: Path) -> Any:
    return ImageFiles(ImageFolder(folder), lambda image: image, 3)


def _timms(folder: Path) -> Any:
    return Samples(import_timm().data.create_dataset("", root=str(folder)), None, 3)


def _torchvisions(folder: Path) -> Any:
    import_timm()
    from torchvision.datasets import ImageFolder as Theirs

    return Subset(Theirs(str(folder)), [0, 2])


@pytest.mark.parametrize("opened", [_ours, _timms, _torchvisions])
@pytest.mark.parametrize("change", ["renamed", "longer", "another class"])
def test_files(folder: Path, opened: Any, change: str) -> None:
    before = cheap_digest(opened(folder))
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved)
    assert cheap_digest(opened(moved)) == before
    if change == "renamed":
        (moved / "cat" / "2.png").rename(moved / "cat" / "3.png")
    elif change == "longer":
        (moved / "cat" / "2.png").write_bytes(b"another picture")
    else:
        (moved / "cat" / "2.png").rename(moved / "dog" / "2.png")
    assert cheap_digest(opened(moved)) != before


def test_sizes_of_many_files_are_a_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastnull.data.digest, "SIZED", 2)  # the first and the last of three
    before = cheap_digest(_ours(folder))
    (folder / "cat" / "2.png").write_bytes(b"not among them")
    assert cheap_digest(_ours(folder)) == before
    (folder / "dog" / "1.png").write_bytes(b"among them")
    assert cheap_digest(_ours(folder)) != before


def test_tensors_and_other_data() -> None:
    images, labels = torch.rand(4, 3, 2, 2), torch.arange(4)
    data = TensorDataset(images, labels)
    before = cheap_digest(Samples(data))
    assert cheap_digest(Samples(TensorDataset(images.clone(), labels.clone()))) == before
    assert cheap_digest(Samples(TensorDataset(images + 1e-6, labels))) != before
    assert cheap_digest(Samples(data, classes=[1, 0, 2, 3])) != before
    assert cheap_digest(Subset(data, [0, 1])) != cheap_digest(Subset(data, [0, 2]))
    assert cheap_digest([("image", 0)] * 3) != cheap_digest([("image", 0)] * 2)
