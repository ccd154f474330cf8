"""The written-out encoder is used only while reading weights is equivalent to calling modules."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune

from fastnull import FrozenEncoder, NullspaceAugment
from fastnull.vit import NormalizedModel
from fastnull.vit.exact import first_difference, own_methods, same, snapshot
from fastnull.vit.parts import UnsupportedModelError
from fastnull.vit.timm_vit import TimmViT


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class LeakyNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


class Brighter(NormalizedModel):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(0.5 * images + 0.4)


def _replace(parent: nn.Module, name: str, new: nn.Module) -> None:
    new.load_state_dict(getattr(parent, name).state_dict())
    setattr(parent, name, new)


def _old_weight_norm(linear: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(linear)
    with torch.no_grad():
        linear.weight_g.mul_(1.5)


def _doubling(module: nn.Module) -> None:
    """Assigns a forward to the instance, as monkeypatches do."""
    before = module.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return 2 * before(*args, **kwargs)

    module.forward = forward


def attention(model: NormalizedModel) -> Any:
    return model.network.blocks[1].attn


CHANGES: dict[str, Callable[[NormalizedModel], object]] = {
    "a subclass of Linear": lambda m: _replace(attention(m), "proj", Twice(32, 32)),
    "a subclass of LayerNorm": lambda m: _replace(m.network.blocks[0], "norm2", LeakyNorm(32)),
    "a forward hook": lambda m: attention(m).qkv.register_forward_hook(lambda *a: 2 * a[2]),
    "a hook on a block": lambda m: m.network.blocks[1].register_forward_hook(lambda *a: 2 * a[2]),
    "a pre-hook": lambda m: m.network.blocks[0].mlp.register_forward_pre_hook(lambda _, a: (2 * a[0],)),
    "a hook in the patch embedding": lambda m: m.network.patch_embed.proj.register_forward_hook(lambda *a: 2 * a[2]),
    "a hook on the network": lambda m: m.network.register_forward_hook(lambda *a: 2 * a[2]),
    "a pre-hook on the network": lambda m: m.network.register_forward_pre_hook(lambda _, a: (2 * a[0],)),
    "a hook on the model": lambda m: m.register_forward_hook(lambda *a: 2 * a[2]),
    "a pre-hook on the model": lambda m: m.register_forward_pre_hook(lambda _, a: (0.5 * a[0],)),
    "a forward of an instance": lambda m: _doubling(m.network.blocks[1].mlp.fc2),
    "a forward of the network": lambda m: _doubling(m.network),
    "a forward of the model": lambda m: _doubling(m),
    "forward_features of the network": lambda m: setattr(
        m.network, "forward_features", types.MethodType(lambda s, x, **k: 2 * type(s).forward_features(s, x), m.network)
    ),
    "a parametrisation": lambda m: nn.utils.parametrize.register_parametrization(attention(m).qkv, "weight", Scaled()),
    "weight_norm": lambda m: (
        parametrizations.weight_norm(attention(m).proj),
        attention(m).proj.parametrizations.weight.original0.data.mul_(1.5),
    ),
    "weight_norm, the old one": lambda m: _old_weight_norm(attention(m).proj),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.network.blocks[0].mlp.fc1),
    "pruning": lambda m: prune.l1_unstructured(m.network.blocks[0].mlp.fc1, "weight", amount=0.5),
    "a sequence for a linear": lambda m: setattr(
        m.network.blocks[0].mlp, "fc2", nn.Sequential(m.network.blocks[0].mlp.fc2, nn.Linear(32, 32))
    ),
    "another activation": lambda m: setattr(m.network.blocks[0].mlp, "act", nn.ReLU()),
    "another head": lambda m: setattr(m.network, "head", nn.Linear(32, 10)),
    "a longer head": lambda m: setattr(
        m.network, "head", nn.Sequential(nn.Linear(32, 20), nn.Tanh(), nn.Linear(20, 10))
    ),
    "a block less": lambda m: m.network.blocks.__delitem__(0),
    "another patch embedding": lambda m: setattr(m.network.patch_embed, "proj", nn.Conv2d(3, 32, 4, 4)),
    "a parameter replaced": lambda m: setattr(m.network, "pos_embed", nn.Parameter(torch.randn(1, 17, 32))),
    "a buffer replaced": lambda m: setattr(m, "std", 0.5 * m.std),
    "a pooling": lambda m: setattr(m.network, "global_pool", "avg"),
    "an epsilon": lambda m: setattr(m.network.blocks[1].norm1, "eps", 1.0),
    "a padding": lambda m: setattr(m.network.patch_embed.proj, "padding", (1, 1)),
}
STAYS_FAST = {
    "another head", "a block less", "another patch embedding", "a parameter replaced", "a buffer replaced", "a pooling",
    "an epsilon",
}  # fmt: skip


def gap(model: nn.Module, encoder: FrozenEncoder, images: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images) - encoder(encoder.embed(images))).abs().max())


@pytest.mark.parametrize("site", ["patch", "block0", "pixels"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_weights_do_not_show_are_found(
    make_vit: Callable[..., NormalizedModel], images: Tensor, change: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastnull.encoder.frozen._warned", set())
    model = make_vit(depth=3).eval()
    clean = model(images)
    live = FrozenEncoder(model, site=site)
    assert live.backend == "cpu"
    assert gap(model, live, images) < 1e-5
    CHANGES[change](model)
    model.eval()
    assert float((model(images) - clean).abs().max()) > 1e-3, "the change shows"
    fast = change in STAYS_FAST
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        live.sync()
        made_now = FrozenEncoder(model, site=site)
    assert live.backend == made_now.backend == ("cpu" if fast else "reference")
    assert len([one for one in said if "runs on the reference backend" in str(one.message)]) == (0 if fast else 1)
    assert gap(model, live, images) < 1e-5
    assert gap(model, made_now, images) < 1e-5
    if not fast:
        with pytest.raises(UnsupportedModelError, match="backend 'cpu' does not support"):
            FrozenEncoder(model, site=site, backend="cpu")


@pytest.mark.parametrize("site", ["patch", "block0", "pixels"])
@pytest.mark.parametrize("change", CHANGES)
def test_training_goes_on_with_noise_of_the_changed_model(
    make_vit: Callable[..., NormalizedModel], images: Tensor, change: str, site: str
) -> None:
    model = make_vit(depth=3).train()
    aug = NullspaceAugment(model, site=site, fraction=0.0)
    aug.loss(images, torch.arange(8), nn.functional.cross_entropy)
    CHANGES[change](model)
    loss, clean = aug.loss(images, torch.arange(8), nn.functional.cross_entropy)
    assert float(aug.stats["norm"]) > 0
    assert abs(float(loss) - 2 * float(nn.functional.cross_entropy(clean, torch.arange(8)))) > 1e-6
    assert gap(model, aug.encoder, images) < 1e-5


def test_a_hook_that_goes_makes_it_fast_again(vit: NormalizedModel, images: Tensor) -> None:
    handle = vit.network.blocks[0].register_forward_hook(lambda *a: 2 * a[2])
    encoder = FrozenEncoder(vit)
    assert encoder.backend == "reference"
    handle.remove()
    encoder.sync()
    assert encoder.backend == "cpu"
    assert encoder.generation == 1
    assert gap(vit, encoder, images) < 1e-5
    encoder.sync()
    assert encoder.generation == 1, "nothing changed"


def test_a_global_hook_is_found(vit: NormalizedModel) -> None:
    handle = torch_module.register_module_forward_hook(lambda *a: None)
    try:
        assert FrozenEncoder(vit).backend == "reference"
    finally:
        handle.remove()
    assert FrozenEncoder(vit).backend == "cpu"


def test_a_replaced_forward_of_a_class_is_found(
    vit: NormalizedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = FrozenEncoder(vit)
    kind = type(attention(vit))
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: 2 * before(*args, **kwargs))
    assert gap(vit, live, images) > 1e-3, "the change shows"
    live.sync()
    assert live.backend == "reference"
    assert gap(vit, live, images) < 1e-5


def test_attributes_of_training_do_not_change_a_snapshot(vit: NormalizedModel) -> None:
    before = snapshot(vit)
    vit.train()
    attention(vit).proj_drop.p = 0.3
    vit.network.blocks[0].norm1.eps = float("1e-6")  # the value that it has
    assert same(snapshot(vit), before)


def test_a_subclass_of_the_wrapper_is_the_model(vit: NormalizedModel, images: Tensor) -> None:
    model = Brighter(vit.network, [0.5] * 3, [0.5] * 3)
    for site in ("patch", "pixels"):
        encoder = FrozenEncoder(model, site=site)
        assert encoder.backend == "reference"
        assert gap(model, encoder, images) < 1e-5


def test_accelerates_wrapper_only_changes_precision(vit: NormalizedModel, images: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = FrozenEncoder(vit)(FrozenEncoder(vit).embed(images))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # the precision of another test
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(vit)
    assert "forward" in model.__dict__
    assert own_methods(model) == []
    for backend in ("auto", "reference"):
        encoder = FrozenEncoder(model, backend=backend)
        assert encoder.backend == {"auto": "cpu"}.get(backend, backend)
        torch.testing.assert_close(encoder(encoder.embed(images)), plain)


def test_our_own_hooks_are_no_change(vit: NormalizedModel) -> None:
    encoder = FrozenEncoder(vit)
    before = snapshot(vit)
    augs = [NullspaceAugment(vit, site=site) for site in ("patch", "pixels")]
    assert same(before, snapshot(vit))
    assert first_difference(vit.named_modules()) is None
    encoder.sync()
    assert encoder.generation == 0
    assert [aug.encoder.backend for aug in augs] == ["cpu", "cpu"]


def test_wrong_parts_are_found_by_their_values(vit: NormalizedModel, images: Tensor) -> None:
    class Misread(TimmViT):
        def parts(self) -> Any:
            parts = super().parts()
            object.__setattr__(parts.blocks[1], "scale", 1.1 * parts.blocks[1].scale)
            return parts

    adapter = Misread(vit)
    for dtype in (None, torch.float64):
        with pytest.raises(UnsupportedModelError, match=r"a model whose logits would be off by .* when written"):
            FrozenEncoder(adapter, backend="cpu", dtype=dtype)
    encoder = FrozenEncoder(adapter)
    assert encoder.backend == "reference"
    assert gap(vit, encoder, images) < 1e-5


def test_construction_costs_one_pass_of_two_images(vit: NormalizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    vit.network.patch_drop.register_forward_hook(lambda m, a, o: batches.append(len(o)))
    monkeypatch.setattr("fastnull.vit.exact.WATCHERS", ("tests.", __name__))
    encoder = FrozenEncoder(vit)
    assert encoder.backend == "cpu"
    assert batches == [2]
    encoder.sync()
    assert batches == [2]


def test_eval_is_not_called(vit: NormalizedModel, images: Tensor) -> None:
    """loralib's layers merge their weights in `eval`."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("train or eval was called")

    _replace(vit.network.blocks[0].mlp, "fc2", Merging(128, 32))
    for module in vit.modules():
        module.training = True
    for dtype in (None, torch.float64):
        encoder = FrozenEncoder(vit, dtype=dtype)
        encoder.input_gradient(encoder.embed(images), torch.ones(8, 10))
    assert all(module.training for module in vit.modules())
