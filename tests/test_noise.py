"""Noise files: what is written is read, and nothing else is."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastnull.noise import Noise


@pytest.fixture
def noise() -> Noise:
    tokens = torch.randn(2, 4, 3)
    return Noise(
        tokens=tokens,
        influence=torch.tensor([0.01, 0.2]),
        norm=tokens.flatten(1).norm(dim=1),
        converged=torch.tensor([True, False]),
        steps=torch.tensor([3, 9]),
        site="patch",
        metadata={"seed": 5},
    )


def test_round_trip(noise: Noise, tmp_path: Path) -> None:
    noise.save(tmp_path / "n.safetensors")
    loaded = Noise.load(tmp_path / "n.safetensors")
    for name in ("tokens", "influence", "norm", "converged", "steps"):
        assert torch.equal(getattr(loaded, name), getattr(noise, name))
    assert (loaded.site, loaded.metadata) == ("patch", {"seed": 5})
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"]


def test_permuted_keeps_norm_and_values(noise: Noise) -> None:
    control = noise.permuted(seed=1)
    assert not torch.equal(control.tokens, noise.tokens)
    assert torch.equal(control.tokens.flatten(1).sort().values, noise.tokens.flatten(1).sort().values)
    assert control.influence.isnan().all()
    assert torch.equal(control.tokens, noise.permuted(seed=1).tokens)


def test_bad_files_are_refused(noise: Noise, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    with pytest.raises(FileNotFoundError, match="no noise file"):
        Noise.load(path)
    noise.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated"):
        Noise.load(path)
    path.write_bytes(pickle.dumps({"tokens": 1}))
    with pytest.raises(ValueError, match="pickle"):
        Noise.load(path)
    save_file({"tokens": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no noise file of fastnull"):
        Noise.load(path)
    save_file({"tokens": torch.zeros(1)}, path, metadata={"format": "fastnull-noise-1", "site": "patch"})
    with pytest.raises(ValueError, match="lacks influence, norm, converged, steps"):
        Noise.load(path)


def test_nan_in_a_file_is_refused(noise: Noise, tmp_path: Path) -> None:
    noise.tokens[0, 0, 0] = float("nan")
    noise.save(tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="1 NaN"):
        Noise.load(tmp_path / "n.safetensors")


def test_failed_save_leaves_the_old_file(noise: Noise, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    noise.save(path)
    before = path.read_bytes()
    noise.metadata["bad"] = object()
    with pytest.raises(TypeError):
        noise.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
