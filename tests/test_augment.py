"""NullspaceAugment: two views in one pass, hooks that come and go, and copies that carry none."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.encoder import FrozenEncoder
from fastnull.rng import Place, fraction_of
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.synthesis.config import ALL_MODES
from fastnull.synthesis.objective import influence
from fastnull.vit import SITES, NormalizedModel

MODES = tuple(mode for mode in ALL_MODES if mode != "free")
"""Free noise has tests of its own, in tests/synthesis/test_free.py."""


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(8)


class Probe(nn.Module):
    """A linear probe that runs its backbone under torch.no_grad(), or detaches."""

    def __init__(self, backbone: nn.Module, how: str) -> None:
        super().__init__()
        self.backbone, self.how, self.head = backbone, how, nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
        with modes.get(self.how, nullcontext)():
            features = self.backbone(images)
        return self.head(features.detach().clone() if self.how == "detach" else features.clone())


def ready(model: NormalizedModel, images: Tensor, mode: str, site: str = "patch", **changes: Any) -> NullspaceAugment:
    """An augmentation with a bank where its mode wants one, on a model in training mode."""
    aug = NullspaceAugment(model.train(), mode, site=site, **changes)
    aug.refresh([images], check=images)
    return aug


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_loss_is_the_sum_over_both_views(
    vit: NormalizedModel, images: Tensor, labels: Tensor, mode: str, site: str
) -> None:
    aug = ready(vit, images, mode, site, fraction=0.0)
    loss, logits = aug.loss(images, labels, F.cross_entropy)
    # the same noise again, added by hand: the model has no dropout, so training mode changes nothing
    tokens = aug.encoder.embed(images)
    noisy = tokens + aug.at(0).draw(tokens)
    expected = F.cross_entropy(vit(images), labels) + F.cross_entropy(aug.encoder(noisy), labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, vit(images))
    assert aug.stats["norm"] > 0
    assert not torch.equal(noisy, tokens)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_fraction_of_one_view_is_noisy(
    vit: NormalizedModel, images: Tensor, labels: Tensor, mode: str, site: str
) -> None:
    aug = ready(vit, images, mode, site, fraction=0.3)
    with torch.no_grad():
        loss, logits = aug.loss(images, labels, F.cross_entropy)
    assert aug.step == 1
    tokens = aug.encoder.embed(images)
    noise = aug.at(0).draw(tokens)
    assert [bool(row.any()) for row in noise] == [False, False, False, True, False, False, True, False]
    torch.testing.assert_close(logits, aug.encoder(tokens + noise))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert float(aug.stats["norm"]) == pytest.approx(float(noise[[3, 6]].flatten(1).norm(dim=1).mean()))
    # the noise of an image is what it would get if all had some
    for fraction in (1.0, 0.0):
        other = ready(vit, images, mode, site, fraction=fraction)
        torch.testing.assert_close(other.draw(tokens)[[3, 6]], noise[[3, 6]])


def test_noisy_rows_are_spaced_evenly_over_the_larger_batch() -> None:
    place = Place(torch.arange(100), 100)
    for fraction in (0.01, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.9, 1.0):
        chosen = fraction_of(place, fraction, 0)[0]
        assert abs(len(chosen) - 100 * fraction) < 1
        for part in (torch.arange(40), torch.arange(1, 100, 2)):
            positions, found = fraction_of(Place(part, 100), fraction, 0)
            assert found.rows.tolist() == [row for row in part.tolist() if row in chosen.tolist()]
            assert torch.equal(part[positions], found.rows)
            assert found.total == 100


def test_a_fraction_of_batches_of_one_is_noisy(vit: NormalizedModel, images: Tensor) -> None:
    aug = ready(vit, images, "boundary", "pixels", fraction=0.25)
    noisy = [bool(aug.draw(images[:1]).any()) for _ in range(8)]
    assert noisy == [False, False, False, True] * 2
    assert float(aug.stats["norm"]) > 0
    aug.draw(images[:1])
    assert torch.isnan(aug.stats["norm"])
    place = Place(torch.arange(3), 3)
    assert sum(len(fraction_of(place, 0.25, step)[0]) for step in range(40)) == 30
    assert [fraction_of(place, 0.5, step)[0].tolist() for step in range(3)] == [[1]] * 3


def test_gradients_are_those_of_two_separate_views(vit: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    aug = ready(vit, images, "boundary")
    aug.loss(images, labels, F.cross_entropy)[0].backward()
    together = [parameter.grad.clone() for parameter in vit.parameters()]
    vit.zero_grad()
    F.cross_entropy(vit(images), labels).backward()
    aug.step = 0
    with aug:
        F.cross_entropy(vit(images), labels).backward()
    torch.testing.assert_close(together, [parameter.grad for parameter in vit.parameters()], rtol=1e-4, atol=1e-6)


def test_both_views_pass_at_once_where_nothing_needs_the_clean_one(
    vit: NormalizedModel, images: Tensor, labels: Tensor
) -> None:
    aug = ready(vit, images, "random")
    calls = []
    vit.network.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    aug.loss(images, labels, F.cross_entropy)
    assert len(calls) == 1


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", ["boundary", "per_image"])
def test_synthesis_takes_the_clean_views_logits_unless_dropout_is_in_them(
    vit: NormalizedModel, images: Tensor, labels: Tensor, mode: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda self, x: passes.append(1) or forward(self, x))
    aug = ready(vit, images, mode, site, fraction=0.0)
    torch.manual_seed(0)
    aug.loss(images, labels, F.cross_entropy)
    kept = aug.stats["norm"]
    assert not passes
    vit.network.blocks[0].attn.proj_drop.p = 1e-9  # draws random numbers, and drops nothing
    aug.step = 0
    aug.loss(images, labels, F.cross_entropy)
    assert len(passes) == 1
    torch.testing.assert_close(aug.stats["norm"], kept)
    aug.step = 0
    with aug:
        vit(images)
    assert len(passes) == 2, "the hook form has no clean view"
    torch.testing.assert_close(aug.stats["norm"], kept)


def test_boundary_views_are_nearer_to_eps_than_their_start(vit: NormalizedModel, images: Tensor) -> None:
    eps = 0.02
    config = SynthesisConfig(mode="boundary", eps=eps, limit=1.0, steps=20, step_size=0.2)
    aug = NullspaceAugment(vit.train(), "boundary", config=config)
    start = NullspaceAugment(vit, "random", limit=1.0)
    gap = [(influence(*a.views(images)).mean() - eps).abs().item() for a in (start, aug)]
    assert gap[1] < 0.5 * gap[0]


@pytest.mark.parametrize("site", SITES)
def test_hook_form_is_on_in_training_and_off_in_eval(vit: NormalizedModel, images: Tensor, site: str) -> None:
    clean = vit.eval()(images)
    aug = ready(vit, images, "random", site)
    assert torch.equal(vit(images), clean), "created is not attached"
    with aug:
        assert not torch.allclose(vit(images), clean)
        vit.eval()
        assert torch.equal(vit(images), clean), "off in eval"
        vit.train()
        aug.enabled = False
        assert torch.equal(vit(images), clean)
    aug.enabled = True
    assert torch.equal(vit(images), clean), "off after the block"
    aug.attach()
    assert not torch.allclose(vit(images), clean)
    del aug
    assert torch.equal(vit(images), clean), "gone with the object"
    assert not vit._forward_pre_hooks
    assert not vit.network.patch_embed._forward_hooks


def test_copies_carry_no_live_hook(vit: NormalizedModel, images: Tensor) -> None:
    clean = vit(images)
    aug = ready(vit, images, "random").attach()
    for twin in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert twin.training
        assert torch.equal(twin(images), clean)
    assert not torch.equal(vit(images), clean)
    assert aug.step == 1
    assert not [key for key in vit.state_dict() if "noise" in key or "aug" in key]


def test_same_step_same_noise_and_state_resumes(vit: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    aug = ready(vit, images, "universal", count=3, limit=1.0)
    for _ in range(2):
        aug.loss(images, labels, F.cross_entropy)
    state = copy.deepcopy(aug.state_dict())
    third = aug.loss(images, labels, F.cross_entropy)[0]
    fourth = aug.loss(images, labels, F.cross_entropy)[0]
    assert third != fourth
    again = NullspaceAugment(vit, "universal", count=3, limit=1.0)
    again.load_state_dict(state)
    assert again.step == 2
    assert torch.equal(again.loss(images, labels, F.cross_entropy)[0], third)
    with pytest.raises(ValueError, match="state is of mode and site"):
        NullspaceAugment(vit, "boundary").load_state_dict(state)


def test_weights_and_modes_are_left_alone(make_vit: Callable[..., NormalizedModel], images: Tensor) -> None:
    vit = make_vit(proj_drop_rate=0.5, drop_path_rate=0.5).train()
    vit.network.cls_token.requires_grad_(False)
    aug = NullspaceAugment(vit, "per_image")
    before = [parameter.clone() for parameter in vit.parameters()]
    state = torch.get_rng_state()
    aug.draw(aug.encoder.embed(images))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in vit.modules())
    assert not vit.network.cls_token.requires_grad
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(vit.parameters(), before, strict=True))


@pytest.mark.parametrize("site", SITES)
def test_activation_checkpointing_sees_one_noise(
    vit: NormalizedModel, images: Tensor, labels: Tensor, site: str
) -> None:
    aug = ready(vit, images, "boundary", site, fraction=0.0)
    aug.loss(images, labels, F.cross_entropy)[0].backward()
    plain = [parameter.grad.clone() for parameter in vit.parameters()]
    vit.network.set_grad_checkpointing(True)
    for attached in (False, True):
        vit.zero_grad()
        aug.step = 0
        if attached:
            F.cross_entropy(vit(images), labels).backward()
            with aug:
                F.cross_entropy(vit(images), labels).backward()
        else:
            aug.loss(images, labels, F.cross_entropy)[0].backward()
        assert aug.step == 1
        torch.testing.assert_close(plain, [parameter.grad for parameter in vit.parameters()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["patch_embed", "norm_pre", "blocks", "head", "network"])
def test_frozen_parts_in_eval_mode_take_no_noise_away(
    vit: NormalizedModel, images: Tensor, labels: Tensor, mode: str, site: str, part: str
) -> None:
    aug = ready(vit, images, mode, site, fraction=0.0)
    network = vit.network
    (network if part == "network" else network.get_submodule(part)).requires_grad_(False).eval()
    loss, clean = aug.loss(images, labels, F.cross_entropy)
    assert float(aug.stats["norm"]) > 0
    assert abs(float(loss) - 2 * float(F.cross_entropy(clean, labels))) > 1e-6
    clean = clean.detach()
    with aug:
        assert not torch.allclose(vit(images), clean)
        vit.training = False  # the mode of the model that is called, not the modes of its parts
        assert torch.equal(vit(images), clean)


def compiled(vit: NormalizedModel, images: Tensor, *, nested: bool) -> Any:
    """A compiled model, or one whose network is compiled, that has run."""
    torch._dynamo.reset()  # after many compilations it would run eagerly
    inside = torch.compile(vit.network if nested else vit, backend="eager")
    model = (NormalizedModel(inside, [0.5] * 3, [0.5] * 3) if nested else inside).train()
    model(images)
    return model


@pytest.mark.parametrize("nested", [True, False])
def test_attaching_after_compile_ran_is_detected(
    vit: NormalizedModel, images: Tensor, labels: Tensor, nested: bool
) -> None:
    model = compiled(vit, images, nested=nested)
    aug = NullspaceAugment(model, "random")
    with pytest.raises(RuntimeError, match=r"compiled and run before NullspaceAugment was created"):
        aug.loss(images, labels, F.cross_entropy)
    assert aug.step == 0
    with pytest.warns(UserWarning, match=r"torch._dynamo.reset\(\) is called"):
        aug.attach()
    noisy = model(images)
    assert aug.step == 1
    aug.enabled = False
    assert not torch.allclose(noisy, vit(images))


def test_the_hook_form_too_gives_noise_or_an_error(vit: NormalizedModel, images: Tensor) -> None:
    model = compiled(vit, images, nested=True)
    aug = NullspaceAugment(model, "random")
    aug._attached = True  # as if its compilation had not been seen
    with pytest.raises(RuntimeError, match="noise was requested in this training forward and none was added"):
        model(images)
    model.eval()(images)


def test_noise_goes_where_the_patch_embedding_is_now(vit: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    aug = ready(vit, images, "boundary")
    old = vit.network.patch_embed
    vit.network.patch_embed = copy.deepcopy(old)
    vit.network.patch_embed.train()
    loss, clean = aug.loss(images, labels, F.cross_entropy)
    assert abs(float(loss) - 2 * float(F.cross_entropy(clean, labels))) > 1e-6
    assert not old._forward_hooks
    assert len(vit._forward_pre_hooks) == len(vit._forward_hooks) == 1


def test_a_model_under_checkpointing_as_a_whole_is_refused(
    vit: NormalizedModel, images: Tensor, labels: Tensor
) -> None:
    from torch.utils.checkpoint import checkpoint

    aug = ready(vit, images, "boundary")
    with aug, pytest.raises(RuntimeError, match="checkpoint its blocks, not the model"):
        F.cross_entropy(checkpoint(vit, images, use_reentrant=False), labels).backward()


def test_an_error_inside_the_model_leaves_no_noise_behind(vit: NormalizedModel, images: Tensor) -> None:
    aug = ready(vit, images, "random").attach()
    head, vit.network.head = vit.network.head, torch.nn.Linear(5, 10)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        vit(images)
    vit.network.head = head
    before = aug.step
    with pytest.raises(RuntimeError, match="and not the model itself"):
        vit.network.patch_embed(images)
    assert aug.step == before, "no forward of the model runs"


def test_a_second_augmentation_is_not_attached_beside_the_first(vit: NormalizedModel, images: Tensor) -> None:
    first, second = ready(vit, images, "random"), ready(vit, images, "random", "pixels")
    with first:
        vit(images)
        with pytest.raises(RuntimeError, match="another NullspaceAugment is attached to this model"):
            second.attach()
        first.attach()
    with second:
        vit(images)


def test_processes_that_exchange_no_gradients_are_warned_of(
    vit: NormalizedModel, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"is_initialized": True, "get_world_size": 2, "is_available": True}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    aug = ready(vit, images, "random")
    with pytest.warns(UserWarning, match="create the augmentation from the wrapped model"):
        aug.loss(images, labels, F.cross_entropy)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.network(x),
        lambda m, x: m.forward(x),
        lambda m, x: m.network.forward_head(m.network.forward_features(x)),
    ],
    ids=["network", "forward", "features"],
)
def test_calls_past_the_model_are_an_error(
    vit: NormalizedModel, images: Tensor, call: Callable[..., Tensor], site: str
) -> None:
    aug = NullspaceAugment(vit.train(), site=site)
    call(vit, images)  # not attached: no noise was requested
    aug.attach()
    with pytest.raises(RuntimeError, match="a part of the model was called in training"):
        call(vit, images)
    vit(images)
    assert aug.step == 1
    aug.enabled = False
    call(vit, images)
    aug.enabled = True
    call(vit.eval(), images)
    aug.detach()
    call(vit.train(), images)


def test_attaching_reaches_a_compiled_function_of_the_users(vit: NormalizedModel, images: Tensor) -> None:
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        return vit(x)

    step(images)
    vit.train()
    step(images)
    aug = NullspaceAugment(vit)
    with pytest.warns(UserWarning, match="after something was compiled and run"):
        aug.attach()
    step(images)
    assert aug.step == 1
    assert float(aug.stats["norm"]) > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_width(
    vit: NormalizedModel, images: Tensor, dtype: torch.dtype, fraction: float, mode: str
) -> None:
    losses = []
    for labels in (torch.arange(8), torch.arange(8).to(dtype)):
        aug = ready(vit, images, mode, fraction=fraction)
        losses.append(aug.loss(images, labels, F.cross_entropy)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_one_hot_labels_of_integers(vit: NormalizedModel, images: Tensor, dtype: torch.dtype) -> None:
    soft = F.one_hot(torch.arange(8), 10)
    loss, _ = NullspaceAugment(vit.train()).loss(images, soft.to(dtype), F.cross_entropy)
    right, _ = NullspaceAugment(vit).loss(images, torch.arange(8), F.cross_entropy)
    torch.testing.assert_close(loss, right)


def test_a_bank_for_images_of_another_size_is_refused(vit: NormalizedModel, images: Tensor) -> None:
    aug = ready(vit, images, "universal")
    state = aug.state_dict()
    state["bank"]["tokens"] = state["bank"]["tokens"][:, :1]  # one token's noise would go to all tokens
    aug.load_state_dict(state)
    with pytest.raises(ValueError, match=r"noises have shape \[1, 32\], these images at site 'patch' \[16, 32\]"):
        aug.loss(images, torch.arange(8), F.cross_entropy)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_training_goes_on_after_inference_mode(vit: NormalizedModel, images: Tensor, backend: str, site: str) -> None:
    aug = NullspaceAugment(vit.train(), site=site, backend=backend)
    with torch.inference_mode():
        tokens = aug.encoder.embed(images)
        aug.encoder.input_gradient(tokens, torch.ones(8, 10))
        aug.encoder(tokens)
        aug.loss(images, torch.arange(8), F.cross_entropy)
    loss, _ = aug.loss(images, torch.arange(8), F.cross_entropy)
    loss.backward()
    assert vit.network.head.weight.grad is not None


def test_detaching_without_a_forward_warns(vit: NormalizedModel, images: Tensor) -> None:
    aug = ready(vit, images, "random")
    with pytest.warns(UserWarning, match="no training forward of the model ran while"), aug:
        vit.eval()(images)
    vit.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with aug:
            vit(images)
        aug.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_noise_is_bitwise_the_same_inside_autocast(
    vit: NormalizedModel, images: Tensor, mode: str, site: str, backend: str, dtype: torch.dtype
) -> None:
    made = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=inside):
            aug = ready(vit, images, mode, site, backend=backend, fraction=0.0, dtype=torch.float32)
            tokens = aug.encoder.embed(images)
            aug.encoder.sync()
            made.append((tokens, aug.encoder(tokens), aug.draw(tokens)))
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_images_by_keyword(vit: NormalizedModel, images: Tensor) -> None:
    aug = ready(vit, images, "random", "pixels", fraction=0.0).attach()
    clean = vit.eval()(images)
    vit.train()
    assert not torch.allclose(vit(images=images), clean)
    assert aug.step == 1
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        vit(images=3 * images)
    with pytest.raises(TypeError, match="it got none"):
        vit()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", MODES)
def test_any_memory_format(vit: NormalizedModel, images: Tensor, labels: Tensor, mode: str, site: str) -> None:
    losses = []
    for given in (images, images.contiguous(memory_format=torch.channels_last), images.flip(3).flip(3)):
        aug = ready(vit, images, mode, site, fraction=0.0)
        losses.append(aug.loss(given, labels, F.cross_entropy)[0])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_plain_timm_model_takes_normalised_images(vit: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    plain, wrapped = ready(vit.network, images, "boundary"), ready(vit, images, "boundary")
    loss, _ = plain.loss((images - 0.5) / 0.5, labels, F.cross_entropy)
    torch.testing.assert_close(wrapped.loss(images, labels, F.cross_entropy)[0], loss)


def test_autocast_around_the_loss(vit: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    aug = ready(vit, images, "boundary")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = aug.loss(images, labels, F.cross_entropy)
    loss.backward()
    exact = ready(vit, images, "boundary").loss(images, labels, F.cross_entropy)[0]
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()


def test_a_bad_state_changes_nothing(vit: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    aug = ready(vit, images, "universal", limit=1.0)
    aug.loss(images, labels, F.cross_entropy)
    good: dict[str, Any] = {**copy.deepcopy(aug.state_dict()), "step": 99}
    whole = good["bank"]
    bads = [{key: value for key, value in good.items() if key != gone} for gone in good]
    changes: list[dict[str, Any]] = [
        {"config": {**good["config"], "epsilon": 1}},
        {"bank": {"tokens": whole["tokens"]}},
        {"step": "3"},
        {"step": -1},
        {"config": None},
        {"config": {**good["config"], "mode": "boundary"}},
        {"bank": {**whole, "tokens": torch.full_like(whole["tokens"], torch.inf)}},
        {"bank": {**whole, "norm": torch.zeros(5)}},
    ]
    for bad in bads + [{**good, **change} for change in changes]:
        with pytest.raises(ValueError, match=r"state (must be what state_dict|is of mode)"):
            aug.load_state_dict(bad)
        assert aug.step == 1
        assert torch.equal(aug.bank.tokens, whole["tokens"])


def test_a_state_of_another_dtype_is_taken_with_a_warning(vit: NormalizedModel, images: Tensor) -> None:
    aug = NullspaceAugment(vit.train(), dtype=torch.bfloat16)
    aug.draw(images)
    other = NullspaceAugment(vit)
    with pytest.warns(UserWarning, match=r"noise made in torch\.bfloat16, here it is made in torch\.float32"):
        other.load_state_dict(aug.state_dict())
    assert other.step == 1


@pytest.mark.parametrize(("eps", "dtype"), [(0.01, torch.bfloat16), (0.009, torch.float32)])
def test_noise_is_made_in_16_bits_where_they_are_faster_and_suffice(
    make_vit: Callable[..., NormalizedModel],
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    eps: float,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setenv("FASTNULL_CPU_PRODUCTS", "bfloat16")
    wide = make_vit(embed_dim=128).train()
    aug = NullspaceAugment(wide, eps=eps)
    assert aug.encoder.dtype == dtype
    loss, _ = aug.loss(images, torch.arange(8), F.cross_entropy)
    loss.backward()
    assert synthesize(wide, images, aug.config).metadata["dtype"] == str(dtype)
    asked = SynthesisConfig.recommended("boundary", eps=eps, dtype="float32")
    assert NullspaceAugment(wide, config=asked).encoder.dtype == torch.float32
    assert NullspaceAugment(wide, eps=eps, dtype=torch.float64).encoder.dtype == torch.float64


@pytest.mark.parametrize("mode", ["universal", "boundary", "random"])
def test_a_step_draws_nothing_from_a_generator(
    vit: NormalizedModel, images: Tensor, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aug = NullspaceAugment(vit.train(), mode)
    aug.refresh([images])
    before = torch.get_rng_state()
    monkeypatch.setattr(torch, "Generator", lambda *_: pytest.fail("a generator of the host"))
    aug.draw(aug.encoder.embed(images))
    assert torch.equal(torch.get_rng_state(), before)


def test_misuse_has_clear_errors(
    vit: NormalizedModel, images: Tensor, labels: Tensor, make_vit: Callable[..., NormalizedModel]
) -> None:
    with pytest.raises(ValueError, match=r"mode must be one of .* Did you mean 'boundary'"):
        NullspaceAugment(vit, "boundry")
    config = SynthesisConfig(mode="boundary")
    for name, value in {"eps": 0.1, "limit": 1, "steps": 2, "site": "pixels", "count": 5, "seed": 7}.items():
        with pytest.raises(ValueError, match=f"either config or {name}, not both"):
            NullspaceAugment(vit, "boundary", config=config, **{name: value})
    with pytest.raises(ValueError, match=r"site 'block0' needs every token, and the model drops 30% of them"):
        NullspaceAugment(make_vit(patch_drop_rate=0.3), site="block0")
    with pytest.warns(UserWarning, match="a model with one output has none"):
        NullspaceAugment(make_vit(num_classes=1))
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="images must be of a floating dtype"):
            NullspaceAugment(vit, "boundary").encoder.embed(images.to(dtype))
    aug = NullspaceAugment(vit.eval(), "universal")
    with pytest.raises(RuntimeError, match=r"call model.train\(\) first"):
        aug.loss(images, labels, F.cross_entropy)
    vit.train()
    with pytest.raises(RuntimeError, match=r"call refresh\(batches\) first"):
        aug.loss(images, labels, F.cross_entropy)
    aug = NullspaceAugment(vit, "random")
    for bad, message in ((images * 3, r"pixels in \[0, 1\]"), (images[:0], "empty"), (images[:, :2], "3 channels")):
        with pytest.raises(ValueError, match=message):
            aug.loss(bad, labels, F.cross_entropy)
    with pytest.raises(ValueError, match=r"labels must lie in 0..9; got values from 3 to 10"):
        aug.loss(images, labels + 3, F.cross_entropy)
    with pytest.raises(ValueError, match="one entry per image"):
        aug.loss(images, labels[:3], F.cross_entropy)


def test_import_needs_torch_only() -> None:
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'timm', 'torchvision', 'triton', 'safetensors', 'tqdm', 'matplotlib',"
        " 'sklearn', 'scipy', 'PIL'}:\n"
        "            raise ModuleNotFoundError(f'{name} is refused', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import fastnull.augment, fastnull\n"
        "fastnull.NullspaceAugment, fastnull.FrozenEncoder, fastnull.synthesize, fastnull.PatchNullspace\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_views_of_a_fraction_are_made_with_each_images_own_logits(vit: NormalizedModel, images: Tensor) -> None:
    aug = ready(vit, images, "boundary", "patch", fraction=0.5)
    _, noisy = aug.views(images)
    tokens = aug.encoder.embed(images)
    noise = aug.at(0).draw(tokens)  # which computes its own clean logits
    torch.testing.assert_close(noisy, aug.encoder(tokens + noise))


@pytest.mark.parametrize("how", ["no_grad", "inference", "detach"])
def test_a_backbone_without_gradient_says_what_to_do(
    vit: NormalizedModel, images: Tensor, labels: Tensor, how: str
) -> None:
    probe = Probe(vit, how).train()
    for mode in ("boundary", "per_image"):
        aug = NullspaceAugment(probe, mode, site="pixels")
        with pytest.raises(
            ValueError, match=r"no gradient with respect to its input.*backbone\.requires_grad_\(False\)"
        ):
            aug.loss(images, labels, F.cross_entropy)
    with pytest.raises(ValueError, match="mode 'random' needs no gradient"):
        NullspaceAugment(probe, "universal", site="pixels").refresh([images])
    aug = NullspaceAugment(probe, "random", site="pixels")
    loss, _ = aug.loss(images, labels, F.cross_entropy)
    loss.backward()
    assert probe.head.weight.grad is not None


def test_the_advice_for_a_backbone_without_gradient_works(vit: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    probe = Probe(vit.requires_grad_(False), "none").train()
    aug = NullspaceAugment(probe)
    loss, _ = aug.loss(images, labels, F.cross_entropy)
    loss.backward()
    assert float(aug.stats["influence"]) > 0
    assert probe.head.weight.grad is not None
    assert all(parameter.grad is None for parameter in vit.parameters())


@pytest.mark.parametrize("site", SITES)
def test_images_that_are_not_whole_patches_train(
    make_vit: Callable[..., NormalizedModel], labels: Tensor, site: str
) -> None:
    model = make_vit(img_size=19).train()
    images = 0.2 + 0.6 * torch.rand(8, 3, 19, 19)
    aug = NullspaceAugment(model, "boundary", site=site, backend="cpu")
    loss, _ = aug.loss(images, labels, F.cross_entropy)
    loss.backward()
    assert float(aug.stats["influence"]) > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
