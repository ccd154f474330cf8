"""A training step by itself: what it reads of its device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnull.augment import NullspaceAugment
from fastnull.checks import trusted_values
from fastnull.compat import import_timm
from fastnull.distributed import Processes
from fastnull.finetune.config import AUGMENTS, FinetuneConfig
from fastnull.finetune.plan import make_plan
from fastnull.finetune.training import Training
from fastnull.noise import Noise
from fastnull.vit import NormalizedModel

META = torch.device("meta")
"""Stands for a GPU: reading a value of it, which would synchronise, is an error."""
EVERYTHING: dict[str, Any] = {
    "mixup": 0.2, "cutmix": 0.5, "smoothing": 0.1, "clip_grad": 1.0, "layer_decay": 0.8, "accumulate": 2,
    "attack_steps": 2,
}  # fmt: skip


def bank(shape: tuple[int, ...], site: str) -> Noise:
    return Noise(
        tokens=torch.rand(2, *shape), influence=torch.rand(2), norm=torch.rand(2), steps=torch.ones(2),
        converged=torch.ones(2, dtype=torch.bool), site=site,
    )  # fmt: skip


class NoWait(TorchDispatchMode):
    """Refuses copies from the CPU for which a host would wait until the device has them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            copy = func is torch.ops.aten.copy_.default
            source, waits = args[copy], not ((*args, False)[2] if copy else (kwargs or {}).get("non_blocking"))
            # a single number travels with a kernel
            assert not waits or source.device == result.device or source.numel() == 1, f"a copy of {source.shape}"
        return result


@pytest.fixture
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has none for meta tensors, not even one that is off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.usefixtures("_no_autocast")
@pytest.mark.parametrize(
    ("augment", "site"),
    [pair for pair in itertools.product(AUGMENTS, ["patch", "pixels"]) if pair != ("free", "patch")],
)
def test_a_step_waits_for_no_device(vit: NormalizedModel, images: Tensor, augment: str, site: str) -> None:
    """The optimiser's too; timm's averaged weights cannot be on meta."""
    settings = {**EVERYTHING, "augment": augment, "site": site, "num_classes": 10}
    settings["batch_size"] = 16 if augment == "free" else 8
    config = FinetuneConfig(**settings, backend="reference", progress=False)
    training = Training(config, vit.to(META).train(), make_plan(config, 8), 10, META, Processes())
    if augment == "universal":
        training.augment._bank = bank((16, 32) if site == "patch" else (3, 16, 16), site)
    with NoWait():
        for _ in range(2):
            training.train_step(images, torch.arange(8))
    with pytest.raises(RuntimeError, match="meta"):
        training.step_record()  # the read-out


@pytest.mark.usefixtures("_no_autocast")
def test_the_first_batch_alone_is_searched_for_bad_values(vit: NormalizedModel, images: Tensor) -> None:
    """Of a GPU's batches: those on the CPU are all searched."""
    vit, images, labels = vit.to(META).train(), images.to(META), torch.arange(8, device=META)
    aug = NullspaceAugment(vit, "boundary", backend="reference")
    with pytest.raises(RuntimeError, match="meta"):
        aug.loss(images, labels, F.cross_entropy)
    with trusted_values():
        aug.loss(images, labels, F.cross_entropy)
    aug.loss(images, labels, F.cross_entropy)
    with pytest.raises(ValueError, match="one entry per image"):
        aug.loss(images, labels[:3], F.cross_entropy)


OPTIMIZERS = [
    name
    for name in import_timm().optim.list_optimizers()
    # these need other packages and a GPU; second derivatives; half a minute each (kron)
    if not name.startswith(("bnb", "fused", "kron")) and name != "adahessian"
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_noise_is_made_for_the_weights_of_the_step(
    vit: NormalizedModel, images: Tensor, name: str, watch: Callable[..., tuple[list[float], list[Tensor]]]
) -> None:
    """In the finetuning loop, with timm's optimisers; tests/integrations/test_optimizers.py has torch's."""
    config = FinetuneConfig(augment="boundary", num_classes=10, batch_size=8, lr=0.05, opt=name, progress=False)
    training = Training(config, vit.train(), make_plan(config, 8), 10, torch.device("cpu"), Processes())
    assert training.augment.encoder.backend == "cpu"
    gaps, seen = watch(training.augment, images)
    for _ in range(4):
        training.train_step(images, torch.arange(8))
    assert len(gaps) == 4
    assert max(gaps) < 1e-5
    assert (seen[-1] - seen[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adahessian", "opt 'adahessian' needs second derivatives"),
        ("fusedadamw", "opt 'fusedadamw' cannot be used here: .*"),
        ("bnbadamw", "opt 'bnbadamw' cannot be used here: .*"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have them")
def test_optimisers_that_cannot_be_used_are_named(vit: NormalizedModel, name: str, message: str) -> None:
    config = FinetuneConfig(augment="none", num_classes=10, batch_size=8, opt=name, progress=False)
    with pytest.raises(ValueError, match=message):
        Training(config, vit, make_plan(config, 8), 10, torch.device("cpu"), Processes())
