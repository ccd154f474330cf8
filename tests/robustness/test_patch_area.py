"""The patch of the patch attack is the image area of a token, over the kinds of patch embeddings that there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastnull.compat import import_timm
from fastnull.robustness import patch_attack
from fastnull.robustness.attacks.patch import token_area
from fastnull.vit import NormalizedModel

timm = import_timm()

PLAIN = {"vit_tiny_patch16_224": 16, "deit_tiny_distilled_patch16_224": 16, "vit_small_patch8_224": 8,
         "vit_small_patch14_dinov2": 14, "beit_base_patch16_224": 16, "eva02_tiny_patch14_224": 14,
         "cait_xxs24_224": 16, "convit_tiny": 16, "flexivit_small": 16, "vit_relpos_small_patch16_224": 16,
         "test_vit": 16}  # fmt: skip
HYBRID = {"vit_small_r26_s32_224": 32, "vit_tiny_r_s16_p8_224": 32, "vit_base_r50_s16_224": 16,
          "vit_small_resnet26d_224": 32, "vit_small_resnet50d_s16_224": 16}  # fmt: skip
STEMS = {"xcit_nano_12_p8_224": 8, "xcit_nano_12_p16_224": 16, "volo_d1_224": 8, "efficientvit_m0": 16,
         "tiny_vit_5m_224": 4}  # fmt: skip
HIERARCHICAL = {"pvt_v2_b0": 4, "swin_tiny_patch4_window7_224": 4, "swinv2_cr_tiny_224": 4, "hiera_tiny_224": 4,
                "mvitv2_tiny": 4, "nest_tiny": 4, "fasternet_t0": 4}  # fmt: skip


@pytest.mark.parametrize(("name", "side"), (PLAIN | HYBRID | STEMS | HIERARCHICAL).items())
def test_the_area_of_a_token(name: str, side: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        assert token_area(model, torch.zeros(2, *model.pretrained_cfg["input_size"])) == side


@pytest.mark.parametrize("name", ["pit_ti_224", "pit_b_224"])
def test_tokens_that_do_not_tile_the_image_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        with pytest.raises(ValueError, match=r"do not tile images of 224x224 .*: give patch_size"):
            token_area(model, torch.zeros(1, 3, 224, 224))


def test_padded_and_oblong_patches_are_refused() -> None:
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, dynamic_img_size=True, dynamic_img_pad=True
    )
    assert token_area(vit, torch.zeros(1, 3, 32, 48)) == 16
    with pytest.raises(ValueError, match="do not tile images of 30x32"):
        token_area(vit, torch.zeros(1, 3, 30, 32))  # 2 x 2 tokens, the last row padded
    oblong = timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2)
    oblong.patch_embed = timm.layers.PatchEmbed(32, (16, 8), embed_dim=16)
    with pytest.raises(ValueError, match="one every 16x8 pixels"):
        token_area(oblong, torch.zeros(1, 3, 32, 32))


def test_a_border_that_no_patch_holds_is_no_obstacle() -> None:
    vit = timm.models.VisionTransformer(img_size=38, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    model = NormalizedModel(vit, [0.5] * 3, [0.5] * 3).eval()
    images = 0.4 + 0.2 * torch.rand(2, 3, 38, 38)
    assert token_area(model, images) == 16
    found = patch_attack(model, images, torch.tensor([0, 1]), steps=2)
    assert torch.equal(found[..., 32:, :], images[..., 32:, :])
    assert torch.equal(found[..., 32:], images[..., 32:])
    assert changed(found[..., :32, :32], images[..., :32, :32], 16).sum((1, 2)).tolist() == [1, 1]
    with pytest.raises(ValueError, match="patch_size must be at most the sides of the images, 38x38; got 39"):
        patch_attack(model, images, torch.tensor([0, 1]), patch_size=39)


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter splits"):
        patch_attack(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), torch.rand(1, 3, 16, 16), torch.tensor([0]))


def changed(found: Tensor, images: Tensor, side: int) -> Tensor:
    """The cells of a grid with a changed pixel [B, gh, gw]."""
    differs = (found != images).any(1)
    height, width = differs.shape[1:]
    return differs.unflatten(2, (width // side, side)).unflatten(1, (height // side, side)).any(4).any(2)


@pytest.mark.parametrize(("name", "size", "side"), [("vit_small_r26_s32_224", 64, 32), ("pvt_v2_b0", 64, 4)])
def test_one_token_of_a_hybrid_and_of_a_hierarchical_model_changes(name: str, size: int, side: int) -> None:
    options = {"img_size": size} if name.startswith("vit") else {}
    model = NormalizedModel.from_timm(timm.create_model(name, num_classes=3, **options)).eval()
    images = 0.4 + 0.2 * torch.rand(2, 3, size, size)
    found = patch_attack(model, images, torch.tensor([0, 1]), steps=2)
    assert changed(found, images, side).sum((1, 2)).tolist() == [1, 1]
    assert (found != images).any(1).flatten(1).sum(1).min() > 0.9 * side * side
