"""Models by name, weights from files good and bad, and files that rebuild their model."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastnull.compat import import_timm
from fastnull.models import (
    ForeignFileError,
    create_model,
    load_model,
    read_metadata,
    read_state_dict,
    save_checkpoint,
)
from fastnull.nullspace import PatchNullspace
from fastnull.nullspace.inspection import inspect_models
from fastnull.vit import NormalizedModel
from tests.damage import header_of


class Runs:
    """A pickle of this runs a command when it is loaded by plain pickle."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Weights of a vit_digits of their own: no two models start the same."""
    return create_model("vit_digits").network.state_dict()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.safetensors"


def test_vit_digits() -> None:
    model = create_model("vit_digits")
    assert isinstance(model, NormalizedModel)
    assert model.mean.flatten().tolist() == model.std.flatten().tolist() == [0.5] * 3
    network = model.network
    assert (network.embed_dim, len(network.blocks), network.blocks[0].attn.num_heads) == (32, 4, 2)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    assert PatchNullspace.from_model(model).dim == 16


def test_timm_models_bring_their_own_normalisation() -> None:
    deit = create_model("deit_tiny_patch16_224", num_classes=7, depth=1)
    assert deit.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert deit.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert deit.network.num_classes == 7
    augreg = create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1)
    assert augreg.mean.flatten().tolist() == [0.5] * 3
    assert augreg(torch.rand(1, 3, 32, 48)).shape == (1, 1000)
    plain = create_model("deit_tiny_patch16_224", normalize=False, depth=1)
    images = torch.rand(1, 3, 4, 4)
    assert torch.equal(plain.normalize(images), images)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    model = create_model("deit_tiny_patch16_224", channels=channels, depth=1, img_size=32)
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 1000)
    mean = {1: [(0.485 + 0.456 + 0.406) / 3], 3: [0.485, 0.456, 0.406], 4: [0.485, 0.456, 0.406, 0.485]}[channels]
    assert model.mean.flatten().tolist() == pytest.approx(mean)
    assert create_model("vit_digits", channels=channels)(torch.rand(1, channels, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("vit_tiny_patch16_225", {}, ValueError, "Did you mean 'vit_tiny_patch16_224'"),
        ("vit_digit", {}, ValueError, "'vit_digits'"),
        ("vit_tiny_patch16_224.augreg_in22k", {}, ValueError, r"tagged 'augreg_in22k'.*\.augreg_in21k"),
        (5, {}, TypeError, "name must be a string; got int"),
        ("vit_digits", {"pretrained": True}, ValueError, "no pretrained weights for vit_digits"),
        ("vit_digits", {"pretrained": True, "checkpoint": "x.pt"}, ValueError, "exclude each other"),
        ("vit_digits", {"num_classes": 0}, ValueError, "num_classes must be >= 1; got 0"),
        ("vit_digits", {"num_classes": 2.5}, ValueError, "num_classes must be an integer; got 2.5"),
        ("vit_digits", {"num_classes": True}, ValueError, "num_classes must be an integer; got True"),
        ("vit_digits", {"channels": -1}, ValueError, "channels must be >= 1; got -1"),
        ("vit_digits", {"img_size": 0}, ValueError, "img_size must be >= 1; got 0"),
        ("vit_digits", {"img_size": (16, 16, 3)}, ValueError, r"\(height, width\); got"),
        ("vit_digits", {"in_chans": 1}, ValueError, "in_chans is timm's name; here it is channels="),
        ("vit_digits", {"depht": 1}, ValueError, "vit_digits does not take depht"),
        ("resnet18", {"img_size": 64}, ValueError, "resnet18 does not take img_size"),
        ("vit_digits", {"checkpoint": "nowhere.pt"}, FileNotFoundError, "nowhere.pt"),
    ],
)  # fmt: skip
def test_bad_requests(name: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_model(name, **options)


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "alone": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "state_dict": lambda state: OrderedDict(state_dict=OrderedDict(state), optimizer={"state": {}}),
    "ddp": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "compiled DDP of a NormalizedModel": lambda state: {f"_orig_mod.module.network.{k}": v for k, v in state.items()},
    "ema first": lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
    "averaged": lambda state: {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(wrapper: str, legacy: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(WRAPPED[wrapper](state), path, _use_new_zipfile_serialization=not legacy)
    loaded = create_model("vit_digits", checkpoint=path).network.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_never_runs(legacy: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({"model": state, "extra": Runs(f"touch {trace}")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"weights\.pt is refused.*system.*state dict"):
        create_model("vit_digits", checkpoint=path)
    path.write_bytes(pickle.dumps(Runs(f"touch {trace}")))
    with pytest.raises(ValueError, match=r"weights\.pt"):
        read_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "half", "most", "text", "zeros"])
def test_broken_files_are_named(suffix: str, damage: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes({
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "most": whole[:-100],
        "text": b"<!DOCTYPE html><title>404</title>",
        "zeros": bytes(len(whole)),
    }[damage])  # fmt: skip
    with pytest.raises(ValueError, match=rf"broken\{suffix}"):
        create_model("vit_digits", checkpoint=path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "list"), ({"epoch": 3}, "'epoch'"), ({}, "nothing"), ({"model": {"weights": 3}}, "'weights'"),
        (torch.ones(2), "Tensor"),
    ],
)  # fmt: skip
def test_files_without_weights(content: Any, found: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"other\.pt holds no state dict.*{found}"):
        read_state_dict(path)


def test_other_kinds_of_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"weights\.npz: checkpoints end in \.safetensors or \.pth"):
        read_state_dict(path)
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path)


def test_weights_that_do_not_fit_are_named_and_counted(state: dict[str, Tensor], path: Path) -> None:
    changed = {key: value for key, value in state.items() if not key.startswith("blocks.3")}
    changed["surplus"] = torch.zeros(1)
    changed["norm.weight"] = torch.zeros(33)
    save_file(changed, path)
    with pytest.raises(ValueError) as caught:
        create_model("vit_digits", checkpoint=path)
    message = str(caught.value)
    for part in (
        "m.safetensors does not fit VisionTransformer", "12 missing: blocks.3.norm1.weight", ", ...",
        "1 unexpected: surplus", "1 of another shape: norm.weight [33] in the file, [32] in the model",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value: float, state: dict[str, Tensor], path: Path) -> None:
    save_file({**state, "norm.bias": torch.full((32,), value)}, path)
    with pytest.raises(ValueError, match=r"m\.safetensors: NaN or Inf in 1 tensors: norm\.bias"):
        create_model("vit_digits", checkpoint=path)


TYPES = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_another_type_are_refused(dtype: torch.dtype, state: dict[str, Tensor], path: Path) -> None:
    save_file({**state, "blocks.0.mlp.fc1.weight": state["blocks.0.mlp.fc1.weight"].to(dtype)}, path)
    message = rf"m.safetensors: 1 tensors of another type .*: blocks.0.mlp.fc1.weight is {dtype}, not torch.float32"
    with pytest.raises(ValueError, match=message):
        create_model("vit_digits", checkpoint=path)
    save_file({key: value.to(dtype) for key, value in state.items()}, path)
    with pytest.raises(ValueError, match=rf"{len(state)} tensors of another type"):
        create_model("vit_digits", checkpoint=path)
    with pytest.raises(ValueError, match=rf"patch_embed.proj.weight is {dtype}, not torch.float32"):
        inspect_models(["vit_digits"], checkpoint=path)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_saved_model_with_weights_of_another_type_is_refused(dtype: torch.dtype, path: Path) -> None:
    save_checkpoint(create_model("vit_digits").to(torch.float16), path)
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path, header_of(path))
    with pytest.raises(ValueError, match="tensors of another type"):
        load_model(path)


def test_a_sparse_weight_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**state, "head.weight": state["head.weight"].to_sparse()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"head.weight is torch.float32 \(torch.sparse_coo\)"):
        create_model("vit_digits", checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_type_are_taken(dtype: torch.dtype, state: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.to(dtype) for key, value in state.items()}, path)
    loaded = create_model("vit_digits", checkpoint=str(path)).network.state_dict()
    assert all(torch.equal(loaded[key], state[key].to(dtype).float()) for key in state)


BAD_NORMALISATION = {
    "negative mean": ("mean", [0.5, -0.5, 0.5], "mean must be >= 0; got -0.5"),
    "infinite mean": ("mean", [0.5, math.inf, 0.5], "mean must be >= 0; got inf"),
    "NaN mean": ("mean", [math.nan, 0.5, 0.5], r"mean(\[0\])? must be .* got nan"),
    "negative std": ("std", [-0.5, 0.5, 0.5], "std must be > 0; got -0.5"),
    "zero std": ("std", [0.5, 0, 0.5], "std must be > 0; got 0"),
    "infinite std": ("std", [0.5, 0.5, math.inf], "std must be > 0; got inf"),
    "one mean": ("mean", [0.5], r"mean must hold a number for each of 3 channels; got \[0.5\]"),
    "four stds": ("std", [0.5] * 4, "std must hold a number for each of 3 channels"),
}


@pytest.mark.parametrize("case", BAD_NORMALISATION)
def test_bad_normalisation_in_a_file(case: str, path: Path) -> None:
    name, values, message = BAD_NORMALISATION[case]
    _with_header(path, **{name: json.dumps(values)})
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_another_head_is_left_out_only_when_asked_for(state: dict[str, Tensor], path: Path) -> None:
    save_file(create_model("vit_digits", num_classes=7).network.state_dict(), path)
    with pytest.raises(ValueError, match=r"head\.weight \[7, 32\] in the file, \[10, 32\] in the .*pass num_classes"):
        create_model("vit_digits", checkpoint=path)
    with pytest.warns(UserWarning, match="its head has 7 classes.*the head for 5 classes is newly initialised"):
        model = create_model("vit_digits", num_classes=5, checkpoint=path)
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 5)
    stored = read_state_dict(path)
    assert torch.equal(model.network.norm.weight, stored["norm.weight"])
    assert torch.equal(model.network.blocks[0].attn.qkv.weight, stored["blocks.0.attn.qkv.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = create_model("vit_digits", num_classes=7, checkpoint=path)
    assert torch.equal(kept.network.head.weight, stored["head.weight"])

    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    save_file(headless, path)
    with pytest.raises(ValueError, match=r"2 missing: head\.weight, head\.bias"):
        create_model("vit_digits", checkpoint=path)
    with pytest.warns(UserWarning, match="its head has no classes"):
        create_model("vit_digits", num_classes=10, checkpoint=path)


def test_position_embedding_is_resized_only_when_a_size_is_asked_for(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)
    model = create_model("vit_digits", img_size=32, checkpoint=path)
    assert model.network.pos_embed.shape == (1, 65, 32)
    assert torch.equal(model.network.pos_embed[:, :1], state["pos_embed"][:, :1])  # the class token's stays
    assert torch.equal(model.network.norm.weight, state["norm.weight"])
    save_file(model.network.state_dict(), path)
    with pytest.raises(ValueError, match=r"pos_embed \[1, 65, 32\] in the file.*pass img_size to resize"):
        create_model("vit_digits", checkpoint=path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_digits", {}),
        ("vit_digits", {"num_classes": 4, "img_size": (8, 24), "channels": 1, "depth": 2, "class_token": False,
                        "global_pool": "avg"}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 3, "drop_path_rate": 0.1}),
        ("vit_small_patch16_dinov3", {"depth": 1, "num_classes": 3, "img_size": 32}),
        ("deit_tiny_patch16_224", {"depth": 1, "normalize": False, "img_size": 32}),
    ],
)  # fmt: skip
def test_saved_models_rebuild_themselves_bitwise(name: str, options: dict, tmp_path: Path) -> None:
    model = create_model(name, **options).eval()
    path = tmp_path / "deep" / "model.safetensors"
    save_checkpoint(nn.DataParallel(model), path, epoch=3, note="with 'quotes' and ä", scores={"clean": 91.5})
    again = load_model(path).eval()
    size = options.get("img_size", 16)
    images = torch.rand(2, options.get("channels", 3), *(size if isinstance(size, tuple) else (size, size)))
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
    assert again.recipe == model.recipe
    assert torch.equal(again.std, model.std)
    about = read_metadata(path)
    assert about["name"] == name
    assert about["classes"] == options.get("num_classes", model.network.num_classes)
    assert about["metadata"] == {"epoch": 3, "note": "with 'quotes' and ä", "scores": {"clean": 91.5}}
    assert about["provenance"]["torch"] == torch.__version__
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]
    plain = create_model(name, checkpoint=path, **options).network
    assert torch.equal(plain.patch_embed.proj.weight, model.network.patch_embed.proj.weight)


def test_copies_and_own_normalisation_survive(tmp_path: Path) -> None:
    model = copy.deepcopy(create_model("vit_digits"))
    model.mean.fill_(0.1307)
    model.std.copy_(torch.tensor([0.3, 0.2, 0.1]).view(1, 3, 1, 1))
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert torch.equal(again.mean, model.mean)
    assert torch.equal(again.std, model.std)


def test_metadata_is_strings_that_any_reader_can_parse(path: Path) -> None:
    save_checkpoint(create_model("vit_digits"), path)
    header = header_of(path)
    assert header["format"] == "fastnull model 1"
    assert {key: json.loads(header[key]) for key in ("name", "num_classes", "kwargs", "mean")} == {
        "name": "vit_digits", "num_classes": 10, "kwargs": {}, "mean": [0.5] * 3,
    }  # fmt: skip


def test_foreign_models_are_saved_but_not_rebuilt(vit: NormalizedModel, path: Path) -> None:
    for model in (vit, vit.network):
        save_checkpoint(model, path)
        assert read_metadata(path)["rebuilds"] is False
        vit.network.load_state_dict(read_state_dict(path))
        with pytest.raises(ValueError, match=r"VisionTransformer that fastnull\.create_model did not make"):
            load_model(path)


def test_bad_saves_leave_the_old_file(path: Path, tmp_path: Path) -> None:
    model = create_model("vit_digits")
    save_checkpoint(model, path, epoch=1)
    with pytest.raises(TypeError, match="plain JSON values"):
        save_checkpoint(model, path, epoch=object())
    with pytest.raises(TypeError, match="plain JSON values"):
        save_checkpoint(model, path, loss=math.nan)
    with pytest.raises(TypeError, match="plain JSON values"):
        save_checkpoint(create_model("vit_digits", norm_layer=nn.LayerNorm), path)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors; got 'm.pt'"):
        save_checkpoint(model, tmp_path / "m.pt")
    with torch.no_grad():
        model.network.head.bias[0] = math.inf
    with pytest.raises(ValueError, match=r"m\.safetensors: NaN or Inf in 1 tensors: head\.bias"):
        save_checkpoint(model, path, epoch=2)
    assert read_metadata(path)["metadata"] == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_loading_what_is_no_model_file(state: dict[str, Tensor], path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"m\.safetensors"):
        load_model(path)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"m\.safetensors was not written by fastnull.*create_model\(name"):
        load_model(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"m\.safetensors is truncated or not a safetensors file"):
        load_model(path)
    for name in ("m.pth", "m.pth.tar"):
        torch.save({"state_dict": state}, path.with_name(name))
        with pytest.raises(ForeignFileError, match=rf"{name} was not written by fastnull.*create_model\(name"):
            load_model(path.with_name(name))


@pytest.mark.parametrize("names", [["cat", "dog", "frog"], ["a\nb", "caf\u00e9", "\udcff"]])
def test_names_of_classes_are_kept(path: Path, names: list[str]) -> None:
    model = create_model("vit_digits", num_classes=3)
    assert model.classes is None
    model.classes = names
    save_checkpoint(nn.DataParallel(copy.deepcopy(model)), path)
    assert load_model(path).classes == names
    about = read_metadata(path)
    assert (about["classes"], about["class_names"]) == (3, names)
    assert create_model("vit_digits", num_classes=3, checkpoint=path).classes == names
    with pytest.warns(UserWarning, match="newly initialised"):
        assert create_model("vit_digits", num_classes=4, checkpoint=path).classes is None


def test_without_names_there_are_none(path: Path) -> None:
    save_checkpoint(create_model("vit_digits"), path)
    assert load_model(path).classes is None
    assert create_model("vit_digits", checkpoint=path).classes is None
    save_file(load_file(path), path)
    assert create_model("vit_digits", checkpoint=path).classes is None
    _with_header(path, class_names=None)  # a file of an earlier version
    assert load_model(path).classes is None


@pytest.mark.parametrize("names", [["cat", "dog"], "cat dog frog", [1, 2, 3], {"cat": 0}])
def test_names_that_are_none_are_refused(path: Path, names: Any) -> None:
    model = create_model("vit_digits", num_classes=3)
    model.classes = names
    with pytest.raises((TypeError, ValueError), match="classes must be"):
        save_checkpoint(model, path)
    assert not path.exists()
    _with_header(path, class_names=json.dumps(names))
    with pytest.raises(ValueError, match=r"m\.safetensors: its metadata is damaged: classes must be"):
        load_model(path)


def _with_header(path: Path, **changes: str | None) -> None:
    """A file of a vit_digits of three classes with other metadata; None leaves an entry out."""
    save_checkpoint(create_model("vit_digits", num_classes=3), path)
    header = {key: value for key, value in {**header_of(path), **changes}.items() if value is not None}
    save_file(load_file(path), path, header)


def test_a_legacy_file_cut_at_any_byte_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            read_state_dict(path)


@pytest.mark.parametrize(("num_classes", "new"), [(None, False), (1000, False), (7, True)])
def test_new_head_of_pretrained_weights(num_classes: int | None, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_timm()
    create = timm.create_model
    # without the download
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **how: create(name, pretrained=False, **how))
    assert create_model("test_vit", num_classes=num_classes, pretrained=True).new_head is new
    assert not create_model("test_vit", num_classes=num_classes).new_head
