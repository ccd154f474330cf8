"""Models with adapters of PEFT and loralib: the encoder is the model with its adapters, which are what is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.encoder import FrozenEncoder
from fastnull.nullspace import patch_projection
from fastnull.vit import NormalizedModel
from fastnull.vit.base import logits_of
from tests.integrations.models import hf_model

peft = pytest.importorskip("peft")
loralib = pytest.importorskip("loralib")
LABELS = torch.arange(8)
TIMM = ["qkv", "proj", "fc1"]  # `proj` is also the patch embedding's
HF = ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]


def loud(model: nn.Module) -> nn.Module:
    """Adapters start as the identity: move what they train."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def eval_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's own logits in eval mode; from a copy, which has no hooks of ours and may merge."""
    with torch.no_grad():
        return logits_of(copy.deepcopy(model).eval()(images))


def gap(model: nn.Module, encoder: FrozenEncoder, images: Tensor) -> float:
    return float((encoder(encoder.embed(images)) - eval_logits(model, images)).abs().max())


CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "LoRA": lambda t: peft.LoraConfig(r=4, lora_alpha=8, target_modules=t, lora_dropout=0.1),
    "DoRA": lambda t: peft.LoraConfig(r=4, target_modules=t, use_dora=True),
    "rsLoRA": lambda t: peft.LoraConfig(r=4, target_modules=t, use_rslora=True),
    "LoRA with bias": lambda t: peft.LoraConfig(r=4, target_modules=t, lora_bias=True),
    "LoRA, biases too": lambda t: peft.LoraConfig(r=4, target_modules=t, bias="all"),
    "LoRA and head": lambda t: peft.LoraConfig(r=4, target_modules=t, modules_to_save=["head", "classifier"]),
    "LoRA in layers": lambda t: peft.LoraConfig(r=4, target_modules=t[:1]),
    "IA3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[name for name in t if name[:2] == "fc"]),
    "AdaLoRA": lambda t: peft.AdaLoraConfig(init_r=6, target_r=3, target_modules=t, total_step=10, tinit=1, tfinal=1),
    "LoHa": lambda t: peft.LoHaConfig(r=4, target_modules=t),
    "LoKr": lambda t: peft.LoKrConfig(r=4, target_modules=t),
    "OFT": lambda t: peft.OFTConfig(target_modules=t, oft_block_size=4),
    "VeRA": lambda t: peft.VeraConfig(r=4, target_modules=[name for name in t if name != "proj"]),
}


def on_timm(config: Any, vit: NormalizedModel) -> nn.Module:
    return peft.get_peft_model(vit.network, config)


def inside(config: Any, vit: NormalizedModel) -> nn.Module:
    vit.network = peft.get_peft_model(vit.network, config)
    return vit


def around(config: Any, vit: NormalizedModel) -> nn.Module:
    return peft.get_peft_model(vit, config)


def injected(config: Any, vit: NormalizedModel) -> nn.Module:
    peft.inject_adapter_in_model(config, vit.network)
    return vit


def on_transformers(config: Any, vit: NormalizedModel) -> nn.Module:
    return peft.get_peft_model(hf_model(), config)


WHERE = {function.__name__: function for function in (on_timm, inside, around, injected, on_transformers)}


def adapted(kind: str, where: str, vit: NormalizedModel) -> nn.Module:
    names = HF if where == "on_transformers" else TIMM
    return loud(WHERE[where](CONFIGS[kind](names), vit))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("site", ["patch", "block0", "pixels"])
@pytest.mark.parametrize("where", WHERE)
def test_wrappers(where: str, site: str, vit: NormalizedModel, images: Tensor) -> None:
    model = adapted("LoRA", where, vit)
    assert gap(model, FrozenEncoder(model, site=site), images) < 1e-5
    aug = NullspaceAugment(model.train(), "boundary", site=site, fraction=0.0)
    loss, clean = aug.loss(images, LABELS, F.cross_entropy)
    assert loss.item() != pytest.approx(2 * F.cross_entropy(clean, LABELS).item(), abs=1e-4)
    with aug:
        step = aug.step
        model(images)
        assert aug.step == step + 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["on_timm", "on_transformers"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_adapter_trains(
    kind: str, where: str, vit: NormalizedModel, images: Tensor, watch: Callable[..., Any]
) -> None:
    model = adapted(kind, where, vit)
    base = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = eval_logits(model, images)
    assert gap(model, FrozenEncoder(model), images) < 1e-5
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    aug = NullspaceAugment(model.train(), "boundary", steps=1)
    gaps, _ = watch(aug, images)
    for step in range(3):
        loss, _ = aug.loss(images, LABELS, F.cross_entropy)
        loss.backward()
        assert aug.stats["norm"] > 0
        if kind == "AdaLoRA":  # writes its ranks, for which it needs the gradients
            optimizer.step()
            (model.base_model if hasattr(model, "base_model") else model).update_and_allocate(step + 1)
        else:
            optimizer.step()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.zero_grad()
    assert max(gaps) < 1e-5
    assert (eval_logits(model, images) - before).abs().max() > 1e-3
    for name, parameter in model.named_parameters():
        if name in base:
            assert parameter.grad is None
            # AdaLoRA keeps the sizes of its ranks there
            assert torch.equal(parameter, base[name]) or "ranknum" in name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["on_timm", "on_transformers"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3"])
def test_what_users_do_with_adapters(kind: str, where: str, vit: NormalizedModel, images: Tensor) -> None:
    """Merge, take apart, add, choose and switch off: the encoder, made before, follows at each draw."""
    model = adapted(kind, where, vit)
    aug = NullspaceAugment(model.train(), "boundary", steps=1)
    logits: list[Tensor] = []

    def check() -> None:
        aug.loss(images, LABELS, F.cross_entropy)
        assert gap(model, aug.encoder, images) < 1e-5
        logits.append(eval_logits(model, images))

    check()
    model.merge_adapter()
    check()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    check()
    model.add_adapter("second", CONFIGS[kind](HF if where == "on_transformers" else TIMM))
    model.set_adapter("second")
    loud(model)
    check()
    assert (logits[-1] - logits[0]).abs().max() > 1e-3
    if kind != "IA3":
        model.base_model.set_adapter(["default", "second"])
        check()
        assert (logits[-1] - logits[-2]).abs().max() > 1e-3
    model.set_adapter("default")
    check()
    with model.disable_adapter():
        check()
        assert (logits[-1] - logits[0]).abs().max() > 1e-3
    check()
    torch.testing.assert_close(logits[-1], logits[0], rtol=1e-4, atol=1e-4)
    whole = model.merge_and_unload()
    assert gap(whole, FrozenEncoder(whole), images) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_adapters_put_in_after_the_augmentation(vit: NormalizedModel, images: Tensor) -> None:
    aug = NullspaceAugment(vit.train(), "boundary", steps=1)
    aug.loss(images, LABELS, F.cross_entropy)
    peft.inject_adapter_in_model(CONFIGS["LoRA"](["qkv", "fc1"]), vit.network)
    loud(vit)
    aug.loss(images, LABELS, F.cross_entropy)
    assert gap(vit, aug.encoder, images) < 1e-5


def with_loralib(vit: NormalizedModel, *, dropout: float = 0.0, merge: bool = True) -> NormalizedModel:
    for block in vit.network.blocks:
        for holder, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            old = getattr(holder, name)
            sizes = (old.in_features, old.out_features)
            settings: dict[str, Any] = {"r": 4, "lora_dropout": dropout, "merge_weights": merge}
            if name == "qkv":
                new = loralib.MergedLinear(*sizes, enable_lora=[True, False, True], **settings)
            else:
                new = loralib.Linear(*sizes, **settings)
            new.weight.data.copy_(old.weight)
            new.bias.data.copy_(old.bias)
            nn.init.normal_(new.lora_B, 0, 0.2)
            setattr(holder, name, new)
    loralib.mark_only_lora_as_trainable(vit)
    return vit


def lora_layers(vit: nn.Module) -> list[Any]:
    return [module for module in vit.modules() if isinstance(module, loralib.LoRALayer)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("made_in", ["train", "eval"])
def test_loralib(
    made_in: str, merge: bool, backend: str, vit: NormalizedModel, images: Tensor, watch: Callable[..., Any]
) -> None:
    """Its layers add their weights up in eval(), which must not happen within a training step."""
    model = with_loralib(vit.train(), dropout=0.1, merge=merge)
    layers = lora_layers(model)
    base = [layer.weight.clone() for layer in layers]
    model.train(made_in == "train")
    aug = NullspaceAugment(model, "boundary", site="patch", steps=1, backend=backend)
    assert gap(model, aug.encoder, images) < 1e-5
    assert [layer.merged for layer in layers] == [merge and made_in == "eval"] * len(layers)
    model.train()
    gaps, seen = watch(aug, images)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for _ in range(3):
        aug.loss(images, LABELS, F.cross_entropy)[0].backward()
        assert not any(layer.merged for layer in layers)
        assert all(layer.lora_A.grad is not None and layer.lora_A.grad.abs().max() > 0 for layer in layers)
        optimizer.step()
        optimizer.zero_grad()
    assert max(gaps) < 1e-5
    assert (seen[-1] - seen[0]).abs().max() > 1e-3
    for layer, weight in zip(layers, base, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-6)  # put together and apart, rounded
    model.eval()  # merges
    assert gap(model, aug.encoder, images) < 1e-5 or not merge
    aug.encoder.sync()
    assert gap(model, aug.encoder, images) < 1e-5


def test_gradients_beside_loralib_are_those_of_autograd(
    make_vit: Callable[..., NormalizedModel], images: Tensor
) -> None:
    """Synthesis between the two forwards leaves nothing behind: the step is that of the two views by hand."""
    model = with_loralib(make_vit().train())
    aug = NullspaceAugment(model, "boundary", site="patch", steps=1, backend="reference")
    noises: list[Tensor] = []
    draw = aug.draw

    def kept(tokens: Tensor) -> Tensor:
        noises.append(draw(tokens))
        return noises[-1]

    aug.draw = kept  # type: ignore[method-assign]
    other = copy.deepcopy(model)
    aug.loss(images, LABELS, F.cross_entropy)[0].backward()
    clean = other(images)
    other.network.patch_embed.register_forward_hook(lambda _module, _args, output: output + noises[0])
    (F.cross_entropy(clean, LABELS) + F.cross_entropy(other(images), LABELS)).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_exact_nullspace_is_not_taken_of_a_layer_under_an_adapter(vit: NormalizedModel) -> None:
    for config in (peft.LoraConfig(r=2, target_modules=["qkv"]), peft.LoraConfig(r=2, target_modules=["projection"])):
        model = peft.get_peft_model(hf_model() if "projection" in config.target_modules else vit.network, config)
        if "qkv" in config.target_modules:
            assert patch_projection(model).weight.shape == (32, 3, 4, 4)
            continue
        with pytest.raises(ValueError, match=r"has an adapter around its patch embedding \(Conv2d of peft\."):
            patch_projection(model)
        loud(model)
        whole = model.merge_and_unload()
        assert patch_projection(whole) is whole.vit.embeddings.patch_embeddings.projection
    vit.network.patch_embed.proj = loralib.Conv2d(3, 32, kernel_size=4, stride=4, r=2)
    with pytest.raises(ValueError, match=r"has an adapter around its patch embedding \(Conv2d of loralib"):
        patch_projection(vit)


@pytest.mark.parametrize("library", ["PEFT", "loralib"])
def test_adapter_around_a_convolution_that_is_the_site(library: str, images: Tensor) -> None:
    """torchvision's patch module is the convolution itself, whose output is a map."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    with torch.no_grad():
        model.heads.head.weight.normal_()
    if library == "PEFT":
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["conv_proj"]), model)
    else:
        new = loralib.Conv2d(3, 32, kernel_size=4, stride=4, r=2)
        nn.init.normal_(new.lora_B)
        model.conv_proj = new
    loud(model)
    assert gap(model, FrozenEncoder(model), images) < 1e-5
    aug = NullspaceAugment(model.train(), "boundary")
    loss, clean = aug.loss(images, LABELS, F.cross_entropy)
    assert loss.item() != pytest.approx(2 * F.cross_entropy(clean, LABELS).item(), abs=1e-4)
