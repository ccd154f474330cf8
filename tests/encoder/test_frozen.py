"""FrozenEncoder: the written-out encoder against the model's own autograd in float64, feature by feature."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastnull import _C, ops
from fastnull.augment import NullspaceAugment
from fastnull.encoder import FrozenEncoder
from fastnull.encoder import frozen as encoder
from fastnull.encoder.explicit import encoder as explicit_encoder
from fastnull.encoder.explicit.encoder import ExplicitEncoder
from fastnull.encoder.explicit.products import automatic_dtype
from fastnull.encoder.proof import TOLERANCES
from fastnull.ops import common
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.synthesis.objective import noise_objective
from fastnull.vit import SITES, NormalizedModel, split
from fastnull.vit.parts import UnsupportedModelError

Factory = Callable[..., NormalizedModel]

# every feature that changes a formula, alone; depth 3: first, middle and last block run different code
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block": {"depth": 1},
    "mean pool, fc_norm, no class token": {"class_token": False, "global_pool": "avg"},
    "mean pool, fc_norm": {"global_pool": "avg"},
    "mean pool, norm before it": {"global_pool": "avg", "fc_norm": False},
    "mean pool with prefix tokens": {"global_pool": "avg", "pool_include_prefix": True},
    "class token, fc_norm": {"fc_norm": True},
    "no final norm": {"final_norm": False},
    "distillation token": {"distilled": True},
    "registers": {"reg_tokens": 4},
    "registers without position": {"reg_tokens": 2, "no_embed_class": True},
    "no position embedding": {"pos_embed": "none"},
    "LayerScale": {"init_values": 0.5},
    "qk-norm": {"qk_norm": True},
    "norm_pre": {"pre_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "rectangular image and patch": {"img_size": (12, 20), "patch_size": (6, 4)},
    "images that are not whole patches": {"img_size": (18, 23), "patch_size": (4, 5)},
    "head dim 64, one head": {"embed_dim": 64, "num_heads": 1},
    "odd head dim": {"embed_dim": 27, "num_heads": 3},
}


def loud(model: NormalizedModel) -> NormalizedModel:
    """Biases, norms and scales away from 0 and 1, where a forgotten one would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def exact(model: NormalizedModel, images: Tensor, cotangent: Tensor, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, logits and input gradient by the model's own modules in float64."""
    double = FrozenEncoder(copy.deepcopy(model).double(), backend="reference", site=site)
    tokens = double.embed(images.double())
    return tokens, *double.input_gradient(tokens, cotangent.double())


def relative(mine: Tensor, reference: Tensor) -> float:
    return ((mine.double() - reference).norm() / reference.norm()).item()


def cosines(mine: Tensor, reference: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(mine.double().flatten(1), reference.flatten(1))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("feature", FEATURES)
def test_cpu_backend_is_the_model(make_vit: Factory, feature: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"depth": 3, **FEATURES[feature]}
    model = loud(make_vit(**settings))
    size = settings.get("img_size", (16, 16))
    images, cotangent = torch.rand(3, 3, *size), torch.randn(3, 10)
    tokens, logits, gradient = exact(model, images, cotangent, site)
    # the formulas: float64 on the ops' references
    double = FrozenEncoder(copy.deepcopy(model).double(), backend="cpu", site=site)
    for mine, reference in zip(double.input_gradient(tokens, cotangent), (logits, gradient), strict=True):
        assert relative(mine, reference) < 1e-12
    for dtype, products, bound in (
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 6e-2),
        (torch.bfloat16, torch.float32, 6e-2),
    ):
        monkeypatch.setenv("FASTNULL_CPU_PRODUCTS", str(products)[6:])
        mine = FrozenEncoder(model, dtype=dtype, backend="cpu", site=site)
        assert mine.products == products
        assert relative(mine.embed(images), tokens) < bound
        assert relative(mine(tokens.to(dtype)), logits) < bound
        got_logits, got_gradient = mine.input_gradient(tokens.to(dtype), cotangent)
        assert relative(got_logits, logits) < bound
        assert relative(got_gradient, gradient) < bound
        assert cosines(got_gradient, gradient).min() > (0.999 if dtype == torch.bfloat16 else 1 - 1e-9)


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.parametrize("site", SITES)
def test_bfloat16_is_no_worse_than_twice_torchs(
    make_vit: Factory, site: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNULL_CPU_PRODUCTS", products)
    model = loud(make_vit(depth=4))
    images, cotangent = torch.rand(4, 3, 16, 16), torch.randn(4, 10)
    tokens, logits, gradient = exact(model, images, cotangent, site)
    errors = {}
    for backend in ("reference", "cpu"):
        frozen = FrozenEncoder(model, dtype=torch.bfloat16, backend=backend, site=site)
        mine = frozen.input_gradient(tokens.bfloat16(), cotangent)
        errors[backend] = [(a.double() - b).abs().max() for a, b in zip(mine, (logits, gradient), strict=True)]
    eps = torch.finfo(torch.bfloat16).eps
    for mine, theirs, reference in zip(errors["cpu"], errors["reference"], (logits, gradient), strict=True):
        assert mine <= 2 * (theirs + eps * reference.abs().max())


# tokens: 50 = B/32 and 197 = /16 at 224, 257 = /14 (all with a class token), 65 and 577 at other sizes: block tails
@pytest.mark.parametrize("grid", [7, 8, 14, 16, 24])
def test_token_counts_of_real_models(make_vit: Factory, grid: int) -> None:
    model = loud(make_vit(img_size=4 * grid, embed_dim=64, num_heads=1))
    images, cotangent = torch.rand(1, 3, 4 * grid, 4 * grid), torch.randn(1, 10)
    tokens, logits, gradient = exact(model, images, cotangent, "patch")
    mine = FrozenEncoder(model, backend="cpu").input_gradient(tokens.float(), cotangent)
    assert relative(mine[0], logits) < 1e-5
    assert relative(mine[1], gradient) < 1e-5
    half = FrozenEncoder(model, dtype=torch.bfloat16, backend="cpu").input_gradient(tokens.bfloat16(), cotangent)
    assert cosines(half[1], gradient).min() > 0.999


def test_sync_gives_what_a_new_encoder_has_bit_for_bit(make_vit: Factory, images: Tensor) -> None:
    for settings in ({"qk_norm": True}, {"init_values": 0.3, "pre_norm": True}):
        for dtype in (torch.float32, torch.bfloat16):
            model = loud(make_vit(**settings))
            frozen = FrozenEncoder(model, dtype=dtype, backend="cpu")
            pointers = [linear.weight.data_ptr() for block in frozen._encoder.blocks for linear in block.linears()]
            before = frozen(frozen.embed(images))
            loud(model)
            assert torch.equal(frozen(frozen.embed(images)), before), "weights are those of the last sync"
            frozen.sync()
            fresh = FrozenEncoder(model, dtype=dtype, backend="cpu")
            tokens, cotangent = fresh.embed(images), torch.randn(8, 10)
            assert torch.equal(frozen.embed(images), tokens)
            mine, theirs = frozen.input_gradient(tokens, cotangent), fresh.input_gradient(tokens, cotangent)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
            now = [linear.weight.data_ptr() for block in frozen._encoder.blocks for linear in block.linears()]
            assert now == pointers, "in place"


def test_bfloat16_tokens_are_no_worse_than_torchs(make_vit: Factory) -> None:
    # a mean of 0.5 over a std of 0.05: the folded bias is ten times the tokens, and rounding it would show
    network = make_vit().network
    model = NormalizedModel(network, [0.5] * 3, [0.05] * 3).eval()
    images = 0.5 + 0.01 * torch.randn(8, 3, 16, 16)
    tokens = FrozenEncoder(copy.deepcopy(model).double(), backend="reference").embed(images.double())
    errors = [
        (FrozenEncoder(model, dtype=torch.bfloat16, backend=backend).embed(images).double() - tokens).mean(0).norm()
        for backend in ("cpu", "reference")
    ]
    assert errors[0] < errors[1]


def test_parts_of_a_batch_are_the_whole(make_vit: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, cotangent = loud(make_vit()), torch.rand(7, 3, 16, 16), torch.randn(7, 10)
    given, made, memories, seen = [], [], [], []

    def of_logits(logits: Tensor, part: slice) -> Tensor:
        seen.append((part.start, part.stop))
        return logits.roll(1, dims=1) + cotangent[part]

    monkeypatch.setattr(explicit_encoder, "CPU_BYTES", 0)
    for images_at_once in (1, 3, 100):  # one, uneven parts of two and three, all seven
        monkeypatch.setattr(explicit_encoder, "CPU_IMAGES", images_at_once)
        frozen = FrozenEncoder(model, backend="cpu")
        tokens = frozen.embed(images)
        given.append(frozen.input_gradient(tokens, cotangent))
        made.append(frozen.input_gradient(tokens, of_logits, by_image=True))
        memories.append(frozen.memory()["kept"])
        made.append(frozen.input_gradient(tokens, lambda logits: of_logits(logits, slice(0, 7))))
    assert seen == [*((i, i + 1) for i in range(7)), (0, 7), (0, 2), (2, 5), (5, 7), (0, 7), (0, 7), (0, 7)]
    assert memories == [memories[0], 3 * memories[0], 7 * memories[0]]
    for first, *others in (given, made):
        for logits, gradient in others:
            torch.testing.assert_close(logits, first[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(gradient, first[1], rtol=1e-4, atol=1e-6)


def test_products_are_timed_once_and_can_be_chosen(vit: NormalizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = FrozenEncoder(vit, dtype=torch.bfloat16, backend="cpu").products
    assert timed in (torch.float32, torch.bfloat16)
    assert FrozenEncoder(vit, dtype=torch.bfloat16, backend="cpu").products == timed
    assert FrozenEncoder(vit, backend="cpu").products == torch.float32
    assert FrozenEncoder(vit, dtype=torch.bfloat16, backend="reference").products == torch.bfloat16
    monkeypatch.setenv("FASTNULL_CPU_PRODUCTS", "float16")
    with pytest.raises(ValueError, match="FASTNULL_CPU_PRODUCTS must be one of 'auto', 'float32', 'bfloat16'"):
        FrozenEncoder(vit, dtype=torch.bfloat16, backend="cpu")


@pytest.mark.parametrize(("products", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_auto_is_16_bits_where_a_processor_multiplies_them_faster(
    make_vit: Factory, products: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNULL_CPU_PRODUCTS", products)
    wide = make_vit(embed_dim=128)
    made = FrozenEncoder(wide, "auto")
    assert (made.dtype, made.backend) == (dtype, "cpu")
    assert made.about() == {"dtype": str(dtype), "products": str(dtype), "backend": "cpu"}
    assert FrozenEncoder(wide).dtype == torch.float32
    assert FrozenEncoder(wide, "auto", backend="reference").dtype == torch.float32, "a copy of it is not proven"
    assert FrozenEncoder(make_vit(), "auto").dtype == torch.float32, "too narrow"
    assert FrozenEncoder(copy.deepcopy(wide).double(), "auto").dtype == torch.float64
    assert FrozenEncoder(copy.deepcopy(wide).bfloat16(), "auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "inside", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float32),  # which the fast backend has not
        ("reference", torch.float16, torch.float16),
    ],
)
def test_auto_is_autocasts_own_inside_it(
    vit: NormalizedModel, images: Tensor, backend: str, inside: torch.dtype, expected: torch.dtype
) -> None:
    with torch.autocast("cpu", dtype=inside):
        made = FrozenEncoder(vit, "auto", backend)
    assert made.dtype == expected
    assert made.embed(images).dtype == expected


def test_auto_is_float32_where_16_bits_are_not_proven(
    make_vit: Factory, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("FASTNULL_CPU_PRODUCTS", "bfloat16")
    monkeypatch.setitem(TOLERANCES, torch.bfloat16, (0.0, 0.0))
    made = FrozenEncoder(make_vit(embed_dim=128), "auto")
    assert (made.dtype, made.backend) == (torch.float32, "cpu")
    assert not recwarn


def test_auto_is_bfloat16_on_a_gpu() -> None:
    with FakeTensorMode():
        weight = torch.empty(32, 3, 4, 4, device="cuda")
        assert automatic_dtype(weight) == torch.bfloat16


def test_the_old_name_of_sync_is_no_condition(vit: NormalizedModel, images: Tensor) -> None:
    frozen = FrozenEncoder(vit, backend="cpu")
    with torch.no_grad():
        vit.network.head.weight.data.mul_(2)
    frozen.sync_if_changed()
    torch.testing.assert_close(frozen(frozen.embed(images)), vit(images))


def test_buffers_are_reused_and_results_are_the_callers(vit: NormalizedModel, images: Tensor) -> None:
    frozen = FrozenEncoder(vit, backend="cpu")
    tokens, cotangent = frozen.embed(images), torch.randn(8, 10)
    logits, gradient = frozen.input_gradient(tokens, cotangent)
    kept = logits.clone(), gradient.clone()
    held = frozen.memory()
    small = frozen.input_gradient(tokens[:3], cotangent[:3])
    frozen(tokens * 2)
    assert frozen.memory() == held, "a smaller batch asks for nothing"
    assert torch.equal(logits, kept[0])
    assert torch.equal(gradient, kept[1])
    torch.testing.assert_close(small[1], gradient[:3], rtol=1e-4, atol=1e-6)
    assert frozen.memory()["kept"] > 0
    frozen.input_gradient(tokens.repeat(2, 1, 1), cotangent.repeat(2, 1))
    assert frozen.memory()["kept"] == pytest.approx(2 * held["kept"], rel=0.01)


def test_logits_of_many_images_take_the_memory_of_one_block(make_vit: Factory) -> None:
    frozen = FrozenEncoder(make_vit(depth=5), backend="cpu")  # four blocks keep something for the backward
    tokens, cotangent = torch.randn(40, 16, 32), torch.randn(40, 10)
    frozen.input_gradient(tokens[:8], cotangent[:8])
    kept = frozen.memory()["kept"]
    frozen(tokens)
    assert frozen.memory()["kept"] == kept + 5 * kept / 4
    frozen.input_gradient(tokens, cotangent)
    assert frozen.memory()["kept"] == 5 * kept, "the buffers for gradients serve logits too"


def test_cotangent_as_tensor_callable_and_tuple(vit: NormalizedModel, images: Tensor) -> None:
    for backend in ("reference", "cpu"):
        frozen = FrozenEncoder(vit, backend=backend)
        tokens = frozen.embed(images)
        clean = frozen(tokens).roll(1, 0)
        expected = frozen.input_gradient(tokens, noise_objective(clean, frozen(tokens)).cotangent)[1]
        for rest in ((), (1,)):
            called = frozen.input_gradient(tokens, lambda y, c=clean, r=rest: (noise_objective(c, y).cotangent, *r))
            assert torch.equal(called[1], expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_comes_beside_the_cotangent_is_returned(
    make_vit: Factory, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = FrozenEncoder(make_vit(), backend=backend)
    tokens = frozen.embed(torch.rand(7, 3, 16, 16))

    def cotangent(logits: Tensor, images: slice) -> tuple[Tensor, Tensor, Tensor]:
        return logits.cos(), logits.sum(1), torch.arange(7)[images]

    monkeypatch.setattr(explicit_encoder, "CPU_BYTES", 0)
    for images_at_once in (1, 3, 100):
        monkeypatch.setattr(explicit_encoder, "CPU_IMAGES", images_at_once)
        logits, gradient, sums, rows = frozen.input_gradient(tokens, cotangent, by_image=True, has_aux=True)
        assert torch.equal(sums, logits.sum(1))
        assert rows.tolist() == list(range(7))
        assert torch.equal(gradient, frozen.input_gradient(tokens, logits.cos())[1])
    assert [len(part) for part in frozen.input_gradient(tokens[:0], cotangent, by_image=True, has_aux=True)] == [0] * 4
    for wrong in (logits, lambda logits: logits, lambda logits: (logits, 1)):
        with pytest.raises(TypeError, match="has_aux"):
            frozen.input_gradient(tokens, wrong, has_aux=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_summed_gradient(
    vit: NormalizedModel, images: Tensor, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # parts of 3 images, so that some belong to two of the sums
    monkeypatch.setattr("fastnull.encoder.explicit.encoder.CPU_IMAGES", 3)
    monkeypatch.setattr("fastnull.encoder.explicit.encoder.CPU_BYTES", 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frozen = FrozenEncoder(vit, dtype=dtype, backend=backend)
    tokens, cotangent = frozen.embed(images), torch.randn(8, 10)
    each = frozen.input_gradient(tokens, cotangent)[1].to(wide)
    for every in (1, 4, 8):
        summed = frozen.input_gradient(tokens, cotangent, sum_every=every)[1]
        assert summed.dtype == wide
        assert summed.shape == (8 // every, *tokens.shape[1:])
        torch.testing.assert_close(summed, each.unflatten(0, (-1, every)).sum(1))
    with pytest.raises(ValueError, match="sum_every must divide the batch of 8 images; got 3"):
        frozen.input_gradient(tokens, cotangent, sum_every=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", SITES)
def test_one_image_none_and_strided_ones(vit: NormalizedModel, images: Tensor, site: str, dtype: torch.dtype) -> None:
    frozen = FrozenEncoder(vit, dtype=dtype, backend="cpu", site=site)
    tokens = frozen.embed(images)
    for strided in (
        images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        torch.cat([images, images], 3)[..., :16],
    ):
        assert not strided.is_contiguous()
        assert torch.equal(frozen.embed(strided), tokens)
    cotangent = torch.randn(8, 10)
    logits, gradient = frozen.input_gradient(tokens, cotangent)
    wide = torch.cat([tokens, tokens], dim=-1)[..., : tokens.shape[-1]]
    assert not wide.is_contiguous()
    assert torch.equal(frozen.input_gradient(wide, cotangent)[1], gradient)
    one = frozen.input_gradient(tokens[:1], cotangent[:1])
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(one[0], logits[:1], **close)
    torch.testing.assert_close(one[1], gradient[:1], **close)
    logits, gradient = frozen.input_gradient(tokens[:0], cotangent[:0])
    assert logits.shape == (0, 10)
    assert gradient.shape == (0, *tokens.shape[1:])


def test_nan_goes_through_and_stays_in_its_image(vit: NormalizedModel, images: Tensor) -> None:
    frozen = FrozenEncoder(vit, backend="cpu")
    tokens, cotangent = frozen.embed(images), torch.randn(8, 10)
    cotangent[2, 3] = float("nan")
    gradient = frozen.input_gradient(tokens, cotangent)[1]
    assert gradient.isnan().flatten(1).any(1).tolist() == [index == 2 for index in range(8)]


def test_no_graph_and_no_parameter_gradients(vit: NormalizedModel, images: Tensor) -> None:
    vit.train()
    for backend in ("reference", "cpu"):
        frozen = FrozenEncoder(vit, backend=backend)
        tokens = frozen.embed(images).requires_grad_(True)
        logits, gradient = frozen.input_gradient(tokens, torch.randn(8, 10))
        assert not logits.requires_grad
        assert not gradient.requires_grad
        assert all(parameter.grad is None and parameter.requires_grad for parameter in vit.parameters())
        assert all(module.training for module in vit.modules())


def test_unsupported_model_runs_on_reference_and_says_so_once(
    make_vit: Factory, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_warned", set())
    model = make_vit(global_pool="map", class_token=False)
    if _C.cpu_available():
        with pytest.warns(UserWarning, match="reference backend: global_pool 'map' is not supported"):
            frozen = FrozenEncoder(model)
        assert frozen.backend == "reference"
        assert FrozenEncoder(model).backend == "reference"  # silent: warnings are errors for a second one below
    with pytest.raises(ValueError, match="backend 'cpu' does not support global_pool 'map'"):
        FrozenEncoder(model, backend="cpu")
    assert FrozenEncoder(make_vit(), dtype=torch.float64).backend == "reference"


def test_auto_takes_the_fast_backend_where_it_is_built(vit: NormalizedModel, images: Tensor) -> None:
    assert FrozenEncoder(vit).backend == ("cpu" if _C.cpu_available() else "reference")
    with _C.disabled():
        assert FrozenEncoder(vit).backend == "reference"
        forced = FrozenEncoder(vit, backend="cpu")
        torch.testing.assert_close(forced(forced.embed(images)), vit(images), rtol=1e-4, atol=1e-5)


def test_same_noise_from_both_backends(vit: NormalizedModel, images: Tensor) -> None:
    vit.train()
    drawn = []
    for backend in ("reference", "cpu"):
        aug = NullspaceAugment(vit, "boundary", backend=backend)
        drawn.append(aug.draw(aug.encoder.embed(images)))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-3, atol=1e-5)


def test_synthesis_computes_what_is_clean_once_a_batch_and_syncs_once(
    vit: NormalizedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = FrozenEncoder(vit, backend="cpu")
    embedded, synced = [], []
    embed, sync = frozen.embed, frozen._encoder.sync
    monkeypatch.setattr(frozen, "embed", lambda x: embedded.append(len(x)) or embed(x))
    monkeypatch.setattr(frozen._encoder, "sync", lambda *given: synced.append(1) or sync(*given))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.01)
    noise = synthesize(frozen, [images[:4], images[4:]], SynthesisConfig(steps=8, stop="never", image_fraction=1.0))
    assert int(noise.steps.min()) >= 6
    assert embedded == [4, 4], "two batches, however many steps"
    assert synced == [1]


def test_misuse_has_clear_errors(vit: NormalizedModel, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'gpu'"):
        FrozenEncoder(vit, backend="gpu")
    with pytest.raises(ValueError, match="site must be one of"):
        FrozenEncoder(vit, site="block1")
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, 'auto' or None; got 'bfloat16'"):
        FrozenEncoder(vit, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float64, .* 'auto' or None; got torch\.int8"):
        NullspaceAugment(vit, dtype=torch.int8)
    frozen = FrozenEncoder(vit, backend="cpu")
    tokens = frozen.embed(images)
    with pytest.raises(ValueError, match=r"tokens at site 'patch' must have shape \[B, 16, 32\]; got \[8, 15, 32\]"):
        frozen(tokens[:, 1:])
    with pytest.raises(TypeError, match="floating dtype"):
        frozen(tokens.long())
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, 16, 16\]; got \[8, 3, 16, 12\]"):
        frozen.embed(images[..., :12])
    with pytest.raises(ValueError, match=r"cotangent must have the logits' shape \[8, 10\]; got \[8, 9\]"):
        frozen.input_gradient(tokens, torch.randn(8, 9))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_gradient_is_zero_where_no_patch_is(make_vit: Factory, backend: str) -> None:
    model = loud(make_vit(img_size=(18, 19)))
    frozen = FrozenEncoder(model, backend=backend, site="pixels")
    images = torch.rand(3, 3, 18, 19, requires_grad=True)
    logits = model(images)
    cotangent = torch.randn_like(logits)
    (expected,) = torch.autograd.grad(logits, images, cotangent)
    _, gradient = frozen.input_gradient(images, cotangent)
    torch.testing.assert_close(gradient, expected)
    assert not gradient[..., 16:, :].any()
    assert not gradient[..., 16:].any()
    assert gradient[..., :16, :16].count_nonzero() == 3 * 3 * 16 * 16
    summed = frozen.input_gradient(images.repeat(2, 1, 1, 1), cotangent.repeat(2, 1), sum_every=6)[1]
    torch.testing.assert_close(summed[0], 2 * expected.sum(0))


def test_a_model_that_pads_its_images_runs_on_reference(make_vit: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_warned", set())
    model = loud(make_vit(img_size=16, dynamic_img_size=True, dynamic_img_pad=True))
    with pytest.warns(UserWarning, match="dynamic_img_size is not supported"):
        frozen = FrozenEncoder(model, site="pixels")
    images = torch.rand(2, 3, 18, 18)
    _, gradient = frozen.input_gradient(images, torch.randn(2, 10))
    assert gradient[..., 16:].count_nonzero() > 0
    with pytest.raises(UnsupportedModelError, match="dynamic_img"):
        FrozenEncoder(make_vit(dynamic_img_pad=True), backend="cpu")


def test_a_forward_that_lost_its_gradient_is_not_written_out(
    vit: NormalizedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_warned", set())
    embed = type(vit.network.patch_embed)
    monkeypatch.setattr(embed, "forward", torch.no_grad()(embed.forward))
    with pytest.warns(UserWarning, match="reference backend: a forward without input gradient is not supported"):
        frozen = FrozenEncoder(vit, site="pixels")
    torch.testing.assert_close(frozen(images), vit(images))  # which need no gradient
    with pytest.raises(ValueError, match=r"no gradient with respect to its input.*requires_grad_\(False\)"):
        frozen.input_gradient(images, torch.randn(8, 10))


def test_model_moved_to_another_device_is_noticed(vit: NormalizedModel, images: Tensor) -> None:
    frozen = FrozenEncoder(vit, backend="cpu")
    tokens = frozen.embed(images)
    vit.to("meta")
    for call in (lambda: frozen(tokens), frozen.sync, lambda: frozen.embed(images)):
        with pytest.raises(RuntimeError, match="moved from cpu to meta: make a new FrozenEncoder"):
            call()


def test_model_is_kept_alive_by_its_encoder(make_vit: Factory, images: Tensor) -> None:
    frozen = FrozenEncoder(make_vit(), backend="cpu")
    frozen.sync()
    assert frozen(frozen.embed(images)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_token_block_over_16_bit_tokens(make_vit: Factory, dtype: torch.dtype) -> None:
    """What the cuda backend does, on the CPU: x̂ and the operands over it in 16 bits, sums and the row in float32."""
    model = loud(make_vit(depth=2))
    images, cotangent = torch.rand(4, 3, 16, 16), torch.randn(4, 10)
    tokens, logits, gradient = exact(model, images, cotangent, "block0")
    frozen = FrozenEncoder(model, dtype=dtype, backend="cpu", site="block0")
    assert frozen._encoder.last.tokens == torch.float32
    frozen._encoder.last.tokens = dtype
    reference = FrozenEncoder(model, dtype=dtype, backend="reference", site="block0")
    mine, theirs = (one.input_gradient(tokens.to(dtype), cotangent) for one in (frozen, reference))
    eps = torch.finfo(dtype).eps
    for got, torchs, truth in zip(mine, theirs, (logits, gradient), strict=True):
        budget = 2 * ((torchs.double() - truth).abs().max() + eps * truth.abs().max())
        assert (got.double() - truth).abs().max() <= budget
    assert cosines(mine[1], gradient).min() > 0.999


def test_class_token_block_over_narrower_tokens_is_the_same_formula(make_vit: Factory) -> None:
    """float64 with x̂ in float32: every product over the tokens is on its path, and errs by float32's rounding alone."""
    model = loud(make_vit(depth=1)).double()
    images, cotangent = torch.rand(3, 3, 16, 16), torch.randn(3, 10)
    tokens, logits, gradient = exact(model, images, cotangent, "patch")
    frozen = FrozenEncoder(model, backend="cpu")
    frozen._encoder.last.tokens = torch.float32
    got_logits, got_gradient = frozen.input_gradient(tokens, cotangent)
    assert relative(got_logits, logits) < 1e-6
    assert 1e-12 < relative(got_gradient, gradient) < 1e-5


class Recorded(TorchDispatchMode):
    """Counts the values of every tensor that is newly allocated, and refuses what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        written = [*args, *(kwargs or {}).values()]
        if isinstance(result, Tensor) and not func.is_view and not any(result is given for given in written):
            self.allocated.append(result.numel())
        return result


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The meta device as a GPU whose kernels run nothing: it takes no other device's tensors and gives no values."""
    monkeypatch.setitem(common.NATIVE_DTYPES, "meta", common.NATIVE_DTYPES["cuda"])
    monkeypatch.setattr(common, "_gpu_serves", lambda device: True)
    yield torch.device("meta")


@pytest.mark.parametrize("settings", [{}, {"global_pool": "avg"}, {"qk_norm": True, "pre_norm": True}])
def test_a_step_waits_for_no_device_and_stays_in_its_workspace(
    make_vit: Factory, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu(monkeypatch) as gpu:
        steps: dict[int, list[int]] = {}
        for depth in (2, 6):
            vit = split(make_vit(depth=depth, **settings).to(gpu))
            explicit = ExplicitEncoder(vit, vit.parts(), torch.float16)
            tokens, cotangent = torch.empty(5, 16, 32, device=gpu), torch.empty(5, 10, device=gpu)
            explicit.input_gradient(tokens, "patch", lambda logits, images, c=cotangent: (c[images],), by_image=True)
            with Recorded() as recorded:
                explicit.input_gradient(
                    tokens, "patch", lambda logits, images, c=cotangent: (c[images],), by_image=True
                )
            steps[depth] = recorded.allocated
    one = 5 * 16 * 32  # the values of one activation
    large = {depth: sum(size >= one for size in sizes) for depth, sizes in steps.items()}
    if "qk_norm" in settings:
        assert large[6] > large[2]  # the counter sees what a block allocates: normalised q and k
    else:
        assert large[6] == large[2], "a block allocates nothing of an activation's size"
        assert large[6] <= 8  # the last block's few, the site's, and what the caller gets


def on_gpu(
    model: NormalizedModel, *, devices: tuple[str, ...] = ("cuda:0",), head: int | None = None
) -> tuple[Any, Any]:
    """An adapter's face with its weights on GPUs that are not there, and its parts."""
    parts = split(model).parts()
    if head is not None:
        wide = [SimpleNamespace(proj=SimpleNamespace(in_features=2 * head), heads=2) for _ in parts.blocks]
        parts = SimpleNamespace(blocks=wide)
    weights = [SimpleNamespace(device=torch.device(name)) for name in devices]
    vit = SimpleNamespace(
        projection=SimpleNamespace(weight=weights[0]), model=SimpleNamespace(parameters=lambda: weights),
        parts=lambda: parts,
    )  # fmt: skip
    return vit, parts


proven: list[str] = []
"""Devices whose kernels were checked."""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Device → why its kernels do not run ("" where they do), and an ExplicitEncoder that only says it was made."""
    problems = {"cuda:0": ""}
    proven.clear()
    monkeypatch.setattr(encoder, "gpu_problem", lambda device: problems[str(device)])
    monkeypatch.setattr(encoder, "triton_problem", lambda: "")
    monkeypatch.setattr(encoder, "ExplicitEncoder", lambda vit, parts, dtype, compute: (parts, dtype, compute))
    for check in ("check_structure", "check_values", "problems_of"):  # there is no model behind it
        monkeypatch.setattr(encoder, check, lambda *_, **__: None)
    monkeypatch.setattr(encoder, "prove", lambda problems, device, asked: proven.append(str(device)))
    monkeypatch.setattr(encoder, "_warned", set())
    monkeypatch.setattr(common, "told", told := set[torch.device]())
    monkeypatch.setattr(encoder, "told", told)
    return problems


@pytest.mark.parametrize("backend", ["auto", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_takes_the_cuda_backend(
    vit: NormalizedModel, gpus: dict[str, str], dtype: torch.dtype, backend: str
) -> None:
    given, parts = on_gpu(vit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder._explicit(given, dtype, backend) == (parts, dtype, dtype)
        with _C.disabled():
            switched = encoder._explicit(given, dtype, backend)
        assert proven == ["cuda:0"], "before its first values; not where kernels are switched off"
        without = encoder._explicit(given, dtype, backend, selftest="off")
    # switched off, `auto` is the reference; forced, the same code runs on the ops' references and library calls
    assert switched == without == (None if backend == "auto" else (parts, dtype, dtype))


UNSUPPORTED: dict[str, tuple[dict[str, Any], str, torch.dtype, str]] = {
    "old GPU": ({}, "the kernels need a GPU of at least sm_80, this one is sm_75", torch.float16, "sm_75"),
    "no Triton": ({}, "the kernels need Triton (no module)", torch.float16, r"need Triton \(no module\)"),
    "float64": ({}, "", torch.float64, r"dtype float64 \(float32, bfloat16 or float16\)"),
    "two GPUs": ({"devices": ("cuda:0", "cuda:1")}, "", torch.float32, r"several devices \(cuda:0, cuda:1\)"),
    "GPU and CPU": ({"devices": ("cuda:0", "cpu")}, "", torch.float32, r"several devices \(cpu, cuda:0\)"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_a_gpu_cannot_run_is_a_warning_once_or_an_error(
    vit: NormalizedModel, gpus: dict[str, str], case: str
) -> None:
    changes, gpus["cuda:0"], dtype, message = UNSUPPORTED[case]
    given, _ = on_gpu(vit, **changes)
    with pytest.warns(UserWarning, match=f"reference backend: .*{message}.* is not supported") as seen:
        results = [encoder._explicit(given, dtype, "auto") for _ in range(2)]
    assert results == [None, None]
    assert not proven
    assert len(seen) == 1
    assert (torch.device("cuda:0") in common.told) == bool(gpus["cuda:0"]), "the ops need not say it again"
    with pytest.raises(UnsupportedModelError, match=f"backend 'cuda' does not support .*{message}"):
        encoder._explicit(given, dtype, "cuda")


def test_without_triton_csrc_s_kernels_serve_where_the_backend_is_forced(
    vit: NormalizedModel, gpus: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself the model stays on the reference backend: csrc/cuda has no LayerNorm and GELU."""
    given, parts = on_gpu(vit)
    monkeypatch.setattr(encoder, "triton_problem", lambda: "the kernels need Triton (no module)")
    with pytest.warns(UserWarning, match=r"reference backend: cuda:0 \(.* need Triton \(no module\)\)") as seen:
        assert [encoder._explicit(given, torch.bfloat16, "auto") for _ in range(2)] == [None, None]
    assert len(seen) == 1
    assert encoder._explicit(given, torch.bfloat16, "cuda") == (parts, torch.bfloat16, torch.bfloat16)
    assert proven == ["cuda:0"]


def test_a_device_without_kernels_takes_the_reference_backend(vit: NormalizedModel, gpus: dict[str, str]) -> None:
    given, _ = on_gpu(vit, devices=("mps:0",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder._explicit(given, torch.float32, "auto") is None
    assert not proven
    for backend in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"needs a model on a device of type '{backend}'; it is on mps:0"):
            encoder._explicit(given, torch.float32, backend)


def test_wide_heads_take_torchs_attention_on_a_gpu_and_say_so_once(vit: NormalizedModel, gpus: dict[str, str]) -> None:
    given, parts = on_gpu(vit, head=160)
    with pytest.warns(UserWarning, match="attention with heads of 160 runs on torch's own operator") as seen:
        results = [encoder._explicit(given, torch.bfloat16, "auto") for _ in range(2)]
    assert [result[0] for result in results] == [parts, parts]
    assert len(seen) == 1
    with pytest.raises(UnsupportedModelError, match=r"'cuda' does not support heads of 160 \(at most 128\)"):
        encoder._explicit(given, torch.bfloat16, "cuda")


def test_an_unsupported_part_on_a_gpu_is_named(make_vit: Factory, gpus: dict[str, str]) -> None:
    given, _ = on_gpu(make_vit())
    given.parts = split(make_vit(global_pool="map", class_token=False)).parts
    with pytest.raises(UnsupportedModelError, match="backend 'cuda' does not support global_pool 'map'"):
        encoder._explicit(given, torch.bfloat16, "cuda")


def test_forced_backends_want_their_own_device(vit: NormalizedModel, gpus: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="backend 'cuda' needs a model on a device of type 'cuda'; it is on cpu"):
        FrozenEncoder(vit, backend="cuda")
    with pytest.raises(ValueError, match="backend 'cpu' needs a model on a device of type 'cpu'; it is on cuda:0"):
        encoder._explicit(on_gpu(vit)[0], torch.float32, "cpu")


def test_the_encoder_runs_on_references_op_by_op(vit: NormalizedModel, images: Tensor) -> None:
    frozen = FrozenEncoder(vit, backend="cpu")
    tokens, cotangent = frozen.embed(images), torch.randn(8, 10)
    expected = frozen.input_gradient(tokens, cotangent)
    for names in ((), ("attention",), ("layer_norm", "linear_gelu")):
        with ops.references(*names):
            got = frozen.input_gradient(tokens, cotangent)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_a_copy_has_a_model_of_its_own(
    copied: Callable[[FrozenEncoder], FrozenEncoder], dtype: torch.dtype | None, make_vit: Factory
) -> None:
    model = make_vit()
    own = FrozenEncoder(model, dtype)
    twin = copied(own)
    assert (twin.backend, twin.dtype, twin.site) == (own.backend, own.dtype, own.site)
    tokens = own.embed(torch.rand(2, 3, 16, 16))
    before = own(tokens)
    torch.testing.assert_close(twin(tokens), before)
    with torch.no_grad():
        model.network.head.bias.add_(1)
    for each in (own, twin):
        each.sync()
    torch.testing.assert_close(own(tokens), before + 1)
    torch.testing.assert_close(twin(tokens), before)
