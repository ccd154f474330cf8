"""Noise is computed with the model's current weights, however they were written."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastnull.augment import NullspaceAugment
from fastnull.compat import import_timm
from fastnull.vit import NormalizedModel

LABELS = torch.arange(8)
SMALL = 1e-5
MOVED = 1e-4  # what a step changes logits by at least, so that noise of older weights would be seen

Watch = Callable[..., tuple[list[float], list[Tensor]]]


def forms() -> Iterator[tuple[str, dict[str, Any]]]:
    """(class, arguments) of every optimiser of torch in each form that runs on this machine's CPU."""
    for name, kind in sorted(vars(torch.optim).items()):
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            continue
        takes = inspect.signature(kind).parameters
        for form in ({}, {"fused": True}, {"foreach": True}, {"foreach": False}, {"capturable": True}):
            if set(form) <= set(takes) and runs(kind, form):
                yield name, form


def runs(kind: type[torch.optim.Optimizer], form: dict[str, Any]) -> bool:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    if kind is torch.optim.SparseAdam:
        weight.grad = weight.grad.to_sparse()
    try:
        kind([weight], **form).step(lambda: torch.zeros(()))
    except (RuntimeError, AssertionError):
        return False
    return True


FORMS = list(forms())


def test_forms_of_optimizers_are_found() -> None:
    names = {name for name, _ in FORMS}
    assert {"AdamW", "SGD", "LBFGS", "Adafactor", "SparseAdam"} <= names
    assert ("AdamW", {"fused": True}) in FORMS
    assert ("Adam", {"foreach": True}) in FORMS


def check_fresh(
    model: NormalizedModel,
    step: Callable[[Callable[[], Tensor]], Any],
    watch: Watch,
    images: Tensor,
    *,
    create_graph: bool = False,
) -> None:
    aug = NullspaceAugment(model.train(), "boundary", steps=1)
    gaps, seen = watch(aug, images)

    def closure() -> Tensor:
        model.zero_grad()
        loss, _ = aug.loss(images, LABELS, F.cross_entropy)
        loss.backward(create_graph=create_graph)
        return loss

    for _ in range(2):
        step(closure)
    closure()
    assert len(gaps) >= 3
    assert (seen[-1] - seen[0]).abs().max() > MOVED
    assert max(gaps) < SMALL


@pytest.mark.parametrize(("name", "form"), FORMS, ids=[f"{name} {form or ''}" for name, form in FORMS])
def test_every_optimizer_of_torch(
    name: str, form: dict[str, Any], vit: NormalizedModel, images: Tensor, watch: Watch
) -> None:
    parameters = list(vit.parameters())
    if name == "Muon":  # takes matrices alone
        parameters = [parameter for parameter in parameters if parameter.ndim == 2]
    optimizer = getattr(torch.optim, name)(parameters, **{"lr": 1e-2, **form})

    def step(closure: Callable[[], Tensor]) -> None:
        if name == "LBFGS":
            optimizer.step(closure)
            return
        closure()
        if name == "SparseAdam":
            for parameter in parameters:
                parameter.grad = parameter.grad.to_sparse()
        optimizer.step()

    check_fresh(vit, step, watch, images)


def of_timm() -> list[str]:
    """timm's optimisers, but for those of libraries that are not here."""
    optim = import_timm().optim
    found = []
    for name in optim.list_optimizers():
        try:
            optim.create_optimizer_v2([nn.Parameter(torch.ones(2, 2))], name, lr=0.01)
        except (AssertionError, ImportError, ModuleNotFoundError, RuntimeError):
            continue
        found.append(name)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", of_timm())
def test_every_optimizer_of_timm(
    name: str, vit: NormalizedModel, images: Tensor, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # Kron compiles, for minutes
    # and needs some ten seconds for the convolution
    trained = vit.network.head if name.startswith("kron") else vit
    optimizer = import_timm().optim.create_optimizer_v2(trained, name, lr=0.05)
    second_order = bool(getattr(optimizer, "is_second_order", False))
    if second_order:
        for block in vit.network.blocks:
            block.attn.fused_attn = False  # which has no second derivative

    def step(closure: Callable[[], Tensor]) -> None:
        closure()
        optimizer.step()

    check_fresh(vit, step, watch, images, create_graph=second_order)


def for_each(write: Callable[[Any, Tensor], Any]) -> Callable[[nn.Module, nn.Module], None]:
    """A function of (parameter, new value), for all parameters of a model."""

    def written(model: nn.Module, other: nn.Module) -> None:
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            write(mine, theirs.detach().clone())

    return written


def by_vector(model: nn.Module, other: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(other.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, model.parameters())


def by_foreach(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(other.parameters()))


def by_loading(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict())


def by_assigning(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def by_new_parameters(model: nn.Module, other: nn.Module) -> None:
    modules = zip(model.modules(), other.modules(), strict=True)
    for mine, theirs in modules:
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(mine, name, nn.Parameter(parameter.detach().clone()))


def by_new_modules(model: nn.Module, other: nn.Module) -> None:
    model.network.head = copy.deepcopy(other.network.head)
    for index, block in enumerate(other.network.blocks):
        model.network.blocks[index] = copy.deepcopy(block)


def by_optimizer_state(model: nn.Module, other: nn.Module) -> None:
    """A fused optimiser with another's state writes the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    model.zero_grad()


def by_swapping_ema(model: nn.Module, other: nn.Module) -> None:
    """As loops do around an evaluation with the mean weights, if they forget to swap back."""
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1))
    ema.update_parameters(other)
    ema.update_parameters(other)
    for mine, mean in zip(model.parameters(), ema.module.parameters(), strict=True):
        mine.data, mean.data = mean.data, mine.data


WRITES = {
    "by_data": for_each(lambda mine, new: mine.data.copy_(new)),
    "by_new_data": for_each(lambda mine, new: setattr(mine, "data", new)),
    "by_storage": for_each(lambda mine, new: mine.untyped_storage().copy_(new.untyped_storage())),
    "by_numpy": for_each(lambda mine, new: numpy.copyto(mine.detach().numpy(), new.numpy())),
    "by_set": for_each(torch.no_grad()(lambda mine, new: mine.set_(new))),
    "by_swap_tensors": for_each(lambda mine, new: torch.utils.swap_tensors(mine, nn.Parameter(new))),
    **{name: function for name, function in globals().items() if name.startswith("by_")},
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("write", WRITES)
def test_every_way_to_write_weights(
    write: str, backend: str, make_vit: Callable[..., NormalizedModel], images: Tensor, watch: Watch
) -> None:
    model, other = make_vit(), make_vit()
    aug = NullspaceAugment(model.train(), "boundary", steps=1, backend=backend)
    gaps, seen = watch(aug, images)
    aug.loss(images, LABELS, F.cross_entropy)
    WRITES[write](model, other)
    loss, _ = aug.loss(images, LABELS, F.cross_entropy)
    assert (seen[1] - seen[0]).abs().max() > MOVED
    assert max(gaps) < SMALL
    # a copy of the new model with a new augmentation gives the same noise
    fresh = NullspaceAugment(copy.deepcopy(model), "boundary", steps=1, backend=backend)
    fresh.step = 1
    torch.testing.assert_close(loss, fresh.loss(images, LABELS, F.cross_entropy)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("write", ["by_data", "by_storage", "by_assigning"])
def test_weights_written_in_other_dtypes(
    write: str, backend: str, make_vit: Callable[..., NormalizedModel], images: Tensor, watch: Watch
) -> None:
    """The reference backend has a copy of the model then."""
    model, other = make_vit(init_values=0.5), make_vit(init_values=0.5)
    aug = NullspaceAugment(model.train(), "boundary", steps=1, backend=backend, dtype=torch.float64)
    _, seen = watch(aug, images)
    aug.loss(images, LABELS, F.cross_entropy)
    WRITES[write](model, other)
    aug.loss(images, LABELS, F.cross_entropy)
    assert (seen[1] - seen[0]).abs().max() > MOVED
    inside = aug.encoder(aug.encoder.embed(images)).float()
    torch.testing.assert_close(inside, model.eval()(images), rtol=0, atol=SMALL)
