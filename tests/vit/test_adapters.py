"""Models of every library: split models give the same results, noise reaches them, and errors say what to do.

Models are small, with random weights. Tests of libraries that are not installed are skipped."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastnull import FrozenEncoder, PatchNullspace, SynthesisConfig, synthesize
from fastnull.augment import NullspaceAugment
from fastnull.encoder.explicit.encoder import ExplicitEncoder
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.nullspace.inspection import inspect_model
from fastnull.vit import HookedViT, NormalizedModel, split
from fastnull.vit.base import logits_of
from fastnull.vit.parts import LiveLinear, UnsupportedModelError
from fastnull.vit.split import as_split
from tests.vit.support_table import PAGE, images_for, page, row, sites
from tests.vit.zoo import KINDS, SIZE, Kind, find

WRITTEN_OUT = {
    ("timm", "ViT"), ("timm", "DeiT, distilled"), ("timm", "DINOv2, registers"), ("timm", "SigLIP, average pooling"),
    ("timm", "CLIP"), ("transformers", "ViT"), ("transformers", "DeiT"), ("transformers", "DeiT, distilled"),
    ("transformers", "DINOv2"), ("transformers", "DINOv2, registers"), ("transformers", "SigLIP"),
    ("torchvision", "ViT"),
}  # fmt: skip


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.library}, {kind.name}")
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param.or_skip()


def test_the_table_in_the_docs_is_what_was_found() -> None:
    for kind in KINDS:
        kind.or_skip()
    assert PAGE.read_text(encoding="utf-8") == page([row(kind) for kind in KINDS]), (
        "docs/models.md is out of date: python tests/vit/support_table.py"
    )


def test_steps_are_the_forward(kind: Kind) -> None:
    model = kind.model()
    found = sites(model)
    assert "pixels" in found
    if kind.name in ("ResNet", "ConvNeXt"):
        assert found == ["pixels"]
        return
    images = images_for(model)
    for wrapped in (model, NormalizedModel(model, [0.4] * 3, [0.25] * 3).eval()):
        vit = split(wrapped)
        with torch.no_grad():
            expected = logits_of(wrapped(images))
            assert torch.equal(vit.head(vit.encode(vit.prepare(vit.patch(images)))), expected)
            patches = vit.patch(images)
            assert expected.shape == (2, vit.num_classes or 5)
            if "block0" in found and "Swin" not in kind.name:
                assert vit.embed(images, "block0").shape[1] == vit.num_prefix_tokens + patches[0, ..., 0].numel()
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_at_the_site_changes_the_logits_and_has_a_gradient(kind: Kind) -> None:
    model = kind.model()
    images = images_for(model)
    for site in sites(model):
        encoder = FrozenEncoder(model, backend="reference", site=site)
        tokens = encoder.embed(images)
        logits, gradient = encoder.input_gradient(tokens, torch.randn(2, 5))
        assert gradient.shape == tokens.shape
        assert float(gradient[1].norm()) > 0
        moved = encoder(torch.stack([tokens[0], tokens[1] + 0.5 * torch.randn_like(tokens[1])]))
        torch.testing.assert_close(moved[0], logits[0], rtol=1e-4, atol=1e-5)
        assert float((moved[1] - logits[1]).abs().max()) > 1e-4


def test_the_written_out_encoder_is_the_model(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind.model().double()
    images = images_for(model).double()
    if (kind.library, kind.name) not in WRITTEN_OUT:
        with pytest.raises(UnsupportedModelError) as reason:
            as_split(model, "pixels").parts()
        monkeypatch.setattr("fastnull.encoder.frozen._warned", set())
        with pytest.warns(UserWarning, match="runs on the reference backend: ") as said:
            assert FrozenEncoder(model.float(), site="pixels").backend == "reference"
        assert str(reason.value) in str(said[0].message)
        return
    cotangent = torch.randn(2, 5, dtype=torch.float64)
    for site in ("patch", "block0", "pixels"):
        fast, slow = (FrozenEncoder(model, backend=backend, site=site) for backend in ("cpu", "reference"))
        tokens = slow.embed(images)
        torch.testing.assert_close(fast.embed(images), tokens)
        (logits, gradient), expected = fast.input_gradient(tokens, cotangent), slow.input_gradient(tokens, cotangent)
        torch.testing.assert_close(logits, expected[0])
        torch.testing.assert_close(gradient, expected[1])
    with torch.no_grad():  # and it follows the weights: bias and weight of query, key and value among them
        for parameter in model.parameters():
            parameter.mul_(1.1)
    fast.sync()
    torch.testing.assert_close(fast(tokens), slow(tokens))


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "SigLIP"])
def test_images_that_are_not_whole_patches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZE, "image_size", 18)  # 4 patches of 4, and 2 pixels that the convolution drops
    model = find("transformers", name).double()
    images = torch.rand(2, 3, 18, 18, dtype=torch.float64, requires_grad=True)
    logits = model(images).logits
    cotangent = torch.randn_like(logits)
    (expected,) = torch.autograd.grad(logits, images, cotangent)
    found, gradient = FrozenEncoder(model, backend="cpu", site="pixels").input_gradient(images, cotangent)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(gradient, expected)
    assert not gradient[..., 16:].any()

    model = model.float().train()
    aug = NullspaceAugment(model)
    loss, _ = aug.loss(torch.rand(4, 3, 18, 18), torch.tensor([0, 1, 2, 3]), nn.functional.cross_entropy)
    loss.backward()
    assert aug.stats["influence"].isfinite()


def test_augmentation_trains_it(kind: Kind) -> None:
    model = kind.model()
    images, labels = images_for(model), torch.tensor([0, 1])
    for site in sites(model):
        aug = NullspaceAugment(model, "boundary", site=site, steps=1, fraction=0.0, backend="reference")
        model.eval()
        expected = logits_of(model(images))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # statistics of two views are not those of one
        loss, clean = aug.loss(images, labels, nn.functional.cross_entropy)
        torch.testing.assert_close(clean, expected, rtol=1e-3, atol=1e-4)
        assert bool(torch.isfinite(aug.stats["influence"]))
        assert float((aug.views(images)[1] - clean).detach().abs().max()) > 1e-5
        loss.backward()
        with aug:
            hooked = logits_of(model(images))
        assert hooked.shape == clean.shape
        assert float((hooked - clean).detach().abs().max()) > 1e-5
        torch.testing.assert_close(logits_of(model(images)), clean, rtol=1e-3, atol=1e-4)


def test_synthesis_meets_epsilon(kind: Kind) -> None:
    model = kind.model()
    images = images_for(model)
    for site in {sites(model)[0], "pixels"}:
        limit = 0.05 if site == "pixels" else 0.5
        config = SynthesisConfig(mode="per_image", site=site, limit=limit, steps=30, eps=0.05, lr=limit / 10)
        noise = synthesize(model, images, config)
        assert bool(noise.converged.all())
        assert bool((noise.influence < 0.05).all())
        assert bool((noise.norm > 0).all())


def test_it_finetunes(kind: Kind) -> None:
    model = NormalizedModel(kind.model(), [0.5] * 3, [0.25] * 3)
    before = copy.deepcopy(model.state_dict())
    images, labels = images_for(model).repeat(4, 1, 1, 1), torch.arange(8) % 5
    config = FinetuneConfig(
        augment="boundary", site=sites(model.network)[0], epochs=2, batch_size=4, noise={"steps": 1}, num_classes=5,
        val_fraction=0.0, progress=False,
    )  # fmt: skip
    result = finetune(config, model, (images, labels))
    assert len(result.history) == 2
    assert all(math.isfinite(row["loss"]) for row in result.history)
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("proj" in key or "conv" in key or "stem" in key for key in moved), moved  # down to its first layer


def test_inspection_measures_it_or_says_why_not(kind: Kind) -> None:
    found = inspect_model(kind.model(), kind.name)
    if kind.name in ("XCiT", "ResNet"):
        assert "Needed is" in found["reason"]
        return
    assert found["reason"] is None
    assert found["rank"] + found["nullity"] == found["values"]
    assert found["nullity"] == max(0, found["values"] - found["width"])


def test_a_hugging_face_model_finetunes() -> None:
    model = NormalizedModel(find("transformers", "ViT"), [0.5] * 3, [0.5] * 3)
    model.network.classifier = nn.Linear(32, 10)
    assert isinstance(model(torch.rand(1, 3, 16, 16)), Tensor)
    config = FinetuneConfig(site="patch", epochs=4, batch_size=32, lr=2e-3, noise={"steps": 1}, progress=False)
    result = finetune(config, model)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]


def test_a_timm_model_within_a_transformers_one_is_timms() -> None:
    class TimmWrapperForImageClassification(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.timm_model = find("timm", "ViT")

    assert split(TimmWrapperForImageClassification()).network.__class__.__name__ == "VisionTransformer"


def _under_old_names(block: nn.Module) -> nn.Module:
    old = nn.Module()
    old.layernorm_before, old.layernorm_after = block.layernorm_before, block.layernorm_after
    old.attention, old.intermediate, old.output = nn.Module(), nn.Module(), nn.Module()
    old.attention.attention, old.attention.output = nn.Module(), nn.Module()
    for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        setattr(old.attention.attention, name, getattr(block.attention, part))
    old.attention.output.dense = block.attention.o_proj
    old.intermediate.dense, old.output.dense = block.mlp.fc1, block.mlp.fc2
    return old


@pytest.mark.parametrize("name", ["ViT", "DeiT, distilled"])
def test_the_written_out_encoder_knows_the_old_names(name: str) -> None:
    """transformers before 5.9: encoder.layer, attention.attention.query, attention.output.dense, intermediate.dense,
    output.dense. With 5.6.0 and 4.57.1 installed all of this file's tests of transformers passed too."""
    model = find("transformers", name)
    base = model.vit if name == "ViT" else model.deit
    if not hasattr(base, "layers"):
        pytest.skip("this transformers has the old names itself")
    images = images_for(model)
    tokens = FrozenEncoder(model, backend="reference").embed(images)
    expected = logits_of(model(images))
    base.encoder = nn.Module()
    base.encoder.layer = nn.ModuleList([_under_old_names(block) for block in base.layers])
    del base.layers  # what is left under its new name cannot be run, only read
    vit = split(model)
    encoder = ExplicitEncoder(vit, vit.parts(), torch.float32)
    torch.testing.assert_close(encoder.logits(tokens, "patch"), expected, rtol=1e-4, atol=1e-5)


def test_a_joined_linear_reads_live_weights() -> None:
    with_bias, without = nn.Linear(3, 2), nn.Linear(3, 4, bias=False)
    joined = LiveLinear.joined(with_bias, without)
    x = torch.randn(5, 3)
    with torch.no_grad():
        with_bias.weight.mul_(2)
        expected = torch.cat([with_bias(x), without(x)], dim=1)
    torch.testing.assert_close(nn.functional.linear(x, joined.weight, joined.bias), expected)
    assert (joined.in_features, joined.out_features) == (3, 6)
    assert LiveLinear.joined(without).bias is None


def test_other_dtypes_run_on_a_copy() -> None:
    model = find("timm", "Swin")
    encoder = FrozenEncoder(model, dtype=torch.float64)
    tokens = encoder.embed(images_for(model))
    assert tokens.dtype == torch.float64
    expected = copy.deepcopy(model).double()(images_for(model).double())
    torch.testing.assert_close(encoder(tokens), expected)
    assert next(model.parameters()).dtype == torch.float32


class Strange(nn.Module):
    """Somebody's own model around a known one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> dict[str, Any] | Tensor:
        return self.inner(images)


def test_a_model_by_the_names_of_its_modules() -> None:
    model = Strange(find("timm", "ViT"))
    vit = HookedViT(model, "inner.patch_embed", "inner.norm_pre", image_size=(32, 32), num_prefix_tokens=1)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(vit.logits(vit.embed(images, "block0"), "block0"), model(images))
    tokens = FrozenEncoder(vit).embed(images)
    torch.testing.assert_close(tokens, split(model.inner).patch(images).detach())


def test_bad_models_say_what_to_do() -> None:
    model = Strange(find("timm", "ViT"))
    with pytest.raises(ValueError, match=r"no adapter splits Strange into.*HookedViT.*SplitViT.*site='pixels'"):
        split(model)
    assert FrozenEncoder(model, site="pixels").backend == "reference"
    with pytest.raises(ValueError, match=r"Strange has no module named 'patches'"):
        HookedViT(model, "patches")
    with pytest.raises(ValueError, match=r"Strange has no known image size: pass image_size"):
        HookedViT(Strange(nn.Sequential(nn.Conv2d(3, 2, 4))), "inner")
    with pytest.raises(ValueError, match="a LayerNorm, has no convolution"):
        HookedViT(model, "inner.norm", image_size=(32, 32))
    with pytest.raises(ValueError, match=r"SwinTransformer has no site 'block0' here"):
        FrozenEncoder(find("timm", "Swin"), site="block0").embed(torch.rand(1, 3, 56, 56))
    with pytest.raises(ValueError, match="no adapter splits ResNet"):
        FrozenEncoder(find("timm", "ResNet"))
    with pytest.raises(ValueError, match="Linear has no convolution"):
        FrozenEncoder(nn.Linear(2, 2), site="pixels")
    # a module that the forward never calls
    model.spare = nn.Conv2d(3, 4, 4)
    vit = HookedViT(model, "spare", image_size=(32, 32))
    with pytest.raises(RuntimeError, match="does not call the module of a site"):
        vit.patch(torch.rand(1, 3, 32, 32))
    with pytest.raises(RuntimeError, match="does not call the module of a site"):
        vit.encode(torch.rand(1, 64, 4))


def test_a_backbone_without_classifier_is_refused() -> None:
    model = find("transformers", "ViT").vit
    with pytest.raises(TypeError, match=r"must return logits.*ForImageClassification"):
        FrozenEncoder(model, backend="reference")(torch.rand(1, 16, 32))


def test_exact_noise_is_invisible_to_a_hugging_face_model() -> None:
    model = find("transformers", "DINOv2")
    space = PatchNullspace.from_model(model)
    images = images_for(model)
    assert (space.dim, space.rank) == (16, 32)
    with torch.no_grad():
        moved = logits_of(model(images + space.sample(images, 0.5)))
        torch.testing.assert_close(moved, logits_of(model(images)), rtol=0, atol=1e-4)
        assert float((logits_of(model(images + 0.5 * torch.randn_like(images))) - moved).abs().max()) > 1e-2
