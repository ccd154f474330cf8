"""The timm adapter: its four steps are the model's own forward, bit for bit, and the model is not changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastnull.compat import import_timm
from fastnull.vit import SITES, NormalizedModel, frozen, split, unwrap
from fastnull.vit.base import check_site
from fastnull.vit.split import as_split
from fastnull.vit.timm_hooked import TimmHooked
from tests.conftest import build_vit

# Every branch of forward_features and forward_head that is in use. 16x16 pixels, patch 4: 16 tokens.
CONFIGS: dict[str, dict[str, Any]] = {
    "class token": {},
    "class token, averaged": {"global_pool": "avg"},  # fc_norm comes in for the final norm
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no class token, norm before pooling": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "attention pooling (SigLIP)": {"class_token": False, "global_pool": "map"},
    "max pooling": {"class_token": False, "global_pool": "avgmax"},
    "registers": {"reg_tokens": 4},
    "registers, embedding without prefix (DINOv2)": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
    "registers without class token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "norm before the blocks (CLIP)": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "LayerScale": {"init_values": 0.5},
    "qk-norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "rectangular": {"img_size": (8, 24)},
    "rectangular patches": {"patch_size": (4, 8)},
    "dynamic size": {"dynamic_img_size": True},
    "dynamic size with padding": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "position dropout and patch dropout": {"pos_drop_rate": 0.3, "patch_drop_rate": 0.5, "drop_path_rate": 0.3},
    "no position embedding": {"pos_embed": "none"},
    "one channel": {"in_chans": 1},
    "one block": {"depth": 1},
}

# Named members that tests/vit/zoo.py lacks
NAMED = [
    "deit3_small_patch16_224",
    "vit_medium_patch16_gap_240",
    "aimv2_large_patch14_224",
    "flexivit_small",
    "vit_relpos_small_patch16_224",
]


def shaken(network: nn.Module) -> nn.Module:
    """Change every parameter: initial zeros and ones would hide a missing branch."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def build(**changes: Any) -> nn.Module:
    return shaken(build_vit(**changes).network)


def check_split(model: nn.Module, images: Tensor) -> None:
    adapter = split(model)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(adapter.head(adapter.encode(adapter.prepare(adapter.patch(images)))), expected)
        for site in SITES:
            assert torch.equal(adapter.logits(adapter.embed(images, site), site), expected), site
        block0 = adapter.embed(images, "block0")
        patches = adapter.embed(images, "patch")
    assert torch.equal(adapter.embed(images, "pixels"), images)
    assert expected.shape == (len(images), adapter.num_classes)
    count = patches.shape[1:-1].numel()  # [B, N, D], or [B, h, w, D] with a dynamic size
    assert block0.shape == (len(images), adapter.num_prefix_tokens + count, patches.shape[-1])
    assert images.shape[1] == adapter.channels


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_steps_are_the_forward(config: str, wrapped: bool) -> None:
    model = build(**CONFIGS[config])
    channels = model.patch_embed.proj.in_channels
    images = torch.rand(3, channels, *model.patch_embed.img_size)
    if wrapped:
        model = NormalizedModel(model, [0.4] * channels, [0.25] * channels).eval()
    check_split(model, images)


def test_dynamic_models_take_other_sizes() -> None:
    model = build(dynamic_img_size=True)
    assert split(model).image_size is None
    check_split(model, torch.rand(2, 3, 8, 24))
    assert split(model).patch(torch.rand(2, 3, 8, 24)).shape == (2, 2, 6, 32)
    assert split(build()).image_size == (16, 16)


@pytest.mark.parametrize("name", NAMED)
def test_named_models(name: str) -> None:
    options = {} if "relpos" in name or "flexivit" in name else {"img_size": 28 if "14" in name else 32}
    model = import_timm().create_model(name, depth=1, embed_dim=64, num_heads=2, num_classes=5, **options)
    if "relpos" in name:  # its blocks take a shared bias that the chain does not know
        assert isinstance(split(model), TimmHooked)
        return
    check_split(shaken(model), torch.rand(2, 3, *model.patch_embed.img_size))


def test_noise_enters_where_the_site_says() -> None:
    """The same noise at `patch` and, with zeros for the prefix, at `block0` agrees if there is no norm between them."""
    model, images = build(), torch.rand(2, 3, 16, 16)
    adapter = split(model)
    noise = torch.randn(16, 32)
    with torch.no_grad():
        at_patch = adapter.logits(adapter.embed(images, "patch") + noise, "patch")
        padded = torch.cat([torch.zeros(1, 32), noise])
        at_block = adapter.logits(adapter.embed(images, "block0") + padded, "block0")
        normed = split(build(pre_norm=True))
        differs = normed.logits(normed.embed(images, "patch") + noise, "patch")
        from_block = normed.logits(normed.embed(images, "block0") + padded, "block0")
    torch.testing.assert_close(at_patch, at_block, rtol=0, atol=1e-5)
    assert float((differs - from_block).abs().max()) > 1e-3


def test_a_hybrid_knows_its_image_channels() -> None:
    with torch.device("meta"):
        model = import_timm().create_model("vit_tiny_r_s16_p8_224")
    assert split(model).channels == 3
    assert split(model).projection.in_channels == 64


def test_wrappers_are_looked_through() -> None:
    model = NormalizedModel(build(), [0.5] * 3, [0.5] * 3)
    wrapped = nn.DataParallel(torch.compile(model))
    assert unwrap(wrapped) is model
    adapter = split(wrapped)
    assert adapter.model is model
    assert adapter.network is model.network
    assert as_split(adapter) is adapter
    compiled_inside = NormalizedModel(torch.compile(model.network), [0.5] * 3, [0.5] * 3)
    assert split(compiled_inside).network is model.network


def test_models_that_cannot_be_split() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        split("vit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no adapter splits Linear into.*SplitViT"):
        split(nn.Linear(2, 2))
    with torch.device("meta"), pytest.raises(ValueError, match="no adapter splits ResNet"):
        split(import_timm().create_model("resnet18"))
    assert check_site("block0") == "block0"
    with pytest.raises(ValueError, match="Did you mean 'patch'"):
        check_site("patches")


def test_normalized_model() -> None:
    model = NormalizedModel(build(), [0.1, 0.2, 0.3], [0.5, 0.25, 0.2])
    images = torch.rand(2, 3, 16, 16)
    expected = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(model.normalize(images), expected)
    assert set(model.state_dict()) == {f"network.{key}" for key in model.network.state_dict()}
    assert copy.deepcopy(model).bfloat16().mean.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="std > 0"):
        NormalizedModel(build(), [0.5] * 3, [0.5, 0.0, 0.5])
    nan, inf = float("nan"), float("inf")
    for mean, std in (([0.5] * 3, [0.5]), ([nan] * 3, [0.5] * 3), ([0.5] * 3, [inf] * 3)):
        with pytest.raises(ValueError, match="a finite value per channel"):
            NormalizedModel(build(), mean, std)
    deit = NormalizedModel.from_timm(import_timm().create_model("deit_tiny_patch16_224", depth=1))
    assert deit.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def modes_and_flags(model: nn.Module) -> list[list[bool]]:
    return [[module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]]


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_restores_modes_and_flags_exactly(fails: bool) -> None:
    model = build(drop_path_rate=0.5, depth=3).train()
    model.blocks[1].eval()
    model.blocks[2].attn.eval()
    model.pos_embed.requires_grad_(False)
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    before = modes_and_flags(model)
    assert all(any(values) and not all(values) for values in before)
    with nullcontext() if not fails else pytest.raises(KeyboardInterrupt), frozen(model):
        with frozen(model):
            pass
        assert not any(map(any, modes_and_flags(model)))
        if fails:
            raise KeyboardInterrupt
    assert modes_and_flags(model) == before


def test_frozen_keeps_gradients_that_were_there_and_adds_none() -> None:
    model, images = build(), torch.rand(2, 3, 16, 16)
    model(images).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    leaf = images.clone().requires_grad_()
    with frozen(model):
        model(leaf).sum().backward()
    assert leaf.grad is not None
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_splitting_changes_nothing_of_the_model(make_vit: Callable[..., NormalizedModel]) -> None:
    model = make_vit().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = split(model)
    adapter.logits(adapter.embed(torch.rand(2, 3, 16, 16), "patch"), "patch")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
