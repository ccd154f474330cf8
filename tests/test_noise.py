"""Noise files: what is written is read, and other files are refused."""

from __future__ import annotations

import pickle
import re
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "n.safetensors"


def test_round_trip(noise: Noise, path: Path, tmp_path: Path) -> None:
    noise.save(path)
    loaded = Noise.load(path)
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


def test_bad_files_are_refused(noise: Noise, path: Path) -> None:
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
    with pytest.raises(ValueError, match="is not a noise file of fastnull"):
        Noise.load(path)
    header = {"format": "fastnull-noise-1", "site": "patch"}
    names = ["tokens", "influence", "norm", "converged", "steps"]
    for name in names:
        save_file({name: torch.zeros(1)}, path, metadata=header)
        with pytest.raises(ValueError, match=f"lacks {', '.join(other for other in names if other != name)}"):
            Noise.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_noise_that_is_not_finite_is_not_saved(noise: Noise, path: Path, tmp_path: Path, value: float) -> None:
    noise.tokens[0, 0, 0] = value
    with pytest.raises(ValueError, match="noise must be finite; it holds"):
        noise.save(path)
    assert not list(tmp_path.iterdir())


def rewritten(noise: Noise, path: Path, header: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    """A noise file with other tensors or another header."""
    noise.save(path)
    whole = {name: getattr(noise, name) for name in ("tokens", "influence", "norm", "converged", "steps")}
    given = {"format": "fastnull-noise-1", "site": "patch", "metadata": "{}"} if header is None else header
    save_file({**whole, **tensors}, path, metadata=given)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("name", ["tokens", "influence", "norm", "converged", "steps"])
def test_tensors_of_another_kind_are_refused(noise: Noise, path: Path, name: str, dtype: torch.dtype) -> None:
    if (name, dtype) in (("converged", torch.bool), ("steps", torch.int64)):
        return
    rewritten(noise, path, **{name: getattr(noise, name).to(dtype)})
    with pytest.raises(ValueError, match=f"{name} must be (of a floating dtype|bool|int64); it is {dtype}"):
        Noise.load(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floating_noise_keeps_its_dtype_and_must_be_finite(noise: Noise, path: Path, dtype: torch.dtype) -> None:
    tokens = noise.tokens.to(dtype)
    rewritten(noise, path, tokens=tokens)
    assert Noise.load(path).tokens.dtype == dtype
    rewritten(noise, path, tokens=tokens.index_fill(2, torch.tensor([0]), float("nan")))
    with pytest.raises(ValueError, match="8 NaN"):
        Noise.load(path)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [("tokens", (2, 12), "[M, N, D] or [M, C, H, W]"), ("influence", (2, 1), "[M]"), ("steps", (1, 2), "[M]")],
)
def test_tensors_of_another_shape_are_refused(
    noise: Noise, path: Path, name: str, shape: tuple[int, ...], wanted: str
) -> None:
    old = getattr(noise, name)
    rewritten(noise, path, **{name: old.flatten()[: 24 if name == "tokens" else 2].view(shape)})
    with pytest.raises(ValueError, match=re.escape(f"{name} must have shape {wanted}; it is {list(shape)}")):
        Noise.load(path)


@pytest.mark.parametrize(
    "header",
    [{}, {"site": "patch"}, {"metadata": "{}"}, {"site": "cls", "metadata": "{}"}, {"site": "", "metadata": "{}"}]
    + [{"site": "patch", "metadata": damaged} for damaged in ("{", "[]", "3", "")],
)
def test_an_invalid_header_is_one_error_that_names_the_file(noise: Noise, path: Path, header: dict[str, str]) -> None:
    rewritten(noise, path, {"format": "fastnull-noise-1", **header})
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} has an invalid header"):
        Noise.load(path)


def test_failed_save_leaves_the_old_file(noise: Noise, path: Path, tmp_path: Path) -> None:
    noise.save(path)
    before = path.read_bytes()
    noise.metadata["bad"] = object()
    with pytest.raises(TypeError):
        noise.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
