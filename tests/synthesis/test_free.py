"""Free noise: along the gradient of the step before, at a strength that follows its influence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnull.augment import NullspaceAugment
from fastnull.finetune import FinetuneConfig
from fastnull.finetune.plan import make_plan
from fastnull.models import create_model
from fastnull.rng import Place
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.synthesis.free import FIRST_STRENGTH, RATE
from fastnull.synthesis.solvers import valid_noise
from fastnull.synthesis.starts import draw_start, step_source
from fastnull.vit import NormalizedModel


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(8)


@pytest.fixture
def loud(vit: NormalizedModel) -> NormalizedModel:
    """A model in training mode that noise changes much."""
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(2)
    return vit.train()


def given(vit: NormalizedModel) -> list[Tensor]:
    """The images that each forward of the model gets."""
    found: list[Tensor] = []
    vit.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().clone()))
    return found


def step(
    aug: NullspaceAugment, images: Tensor, labels: Tensor, criterion: Callable[..., Tensor] = F.cross_entropy
) -> Tensor:
    loss, _ = aug.loss(images, labels, criterion)
    loss.backward()
    return loss.detach()


def test_noise_goes_along_the_gradient_of_the_step_before(
    loud: NormalizedModel, images: Tensor, labels: Tensor
) -> None:
    aug = NullspaceAugment(loud, "free", seed=3)
    seen = given(loud)
    new = images.flip(3)
    leaf = images.clone().requires_grad_()
    (direction,) = torch.autograd.grad(F.cross_entropy(loud(leaf), labels), leaf)
    seen.clear()
    first = step(aug, images, labels)
    assert torch.equal(seen[0], images)
    torch.testing.assert_close(first, F.cross_entropy(loud(images), labels))
    assert aug.stats["norm"].isnan()
    seen.clear()
    second = step(aug, new, labels.flip(0))
    start = draw_start(images, aug.config, step_source(3, 1, torch.arange(8)))
    assert isinstance(start.step_size, Tensor)
    noise = FIRST_STRENGTH * (start.noise + start.step_size.view(-1, 1, 1, 1) * direction.sign())
    noisy = images + valid_noise(images, noise)
    torch.testing.assert_close(seen[0], torch.cat([new, noisy]))
    whole = F.cross_entropy(loud(torch.cat([new, noisy])), torch.cat([labels.flip(0), labels]))
    torch.testing.assert_close(second, whole)
    change = (loud(images).softmax(1) - loud(noisy).softmax(1)).square().sum(1).mean()
    torch.testing.assert_close(aug.stats["influence"], change.detach())
    torch.testing.assert_close(aug.stats["norm"], (noisy - images).flatten(1).norm(dim=1).mean())


def test_the_gradients_of_the_weights_are_those_of_the_batch(
    loud: NormalizedModel, images: Tensor, labels: Tensor
) -> None:
    aug = NullspaceAugment(loud, "free")
    seen = given(loud)
    step(aug, images, labels)
    loud.zero_grad()
    step(aug, images, labels)
    found = {name: parameter.grad for name, parameter in loud.named_parameters()}
    loud.zero_grad()
    F.cross_entropy(loud(seen[-1]), labels.repeat(2)).backward()
    for name, parameter in loud.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize(("eps", "sign"), [(1.9, 1), (1e-6, -1)])
def test_the_strength_follows_the_influence(
    loud: NormalizedModel, images: Tensor, labels: Tensor, eps: float, sign: int
) -> None:
    aug = NullspaceAugment(loud, "free", eps=eps)
    assert aug._free is not None
    step(aug, images, labels)
    step(aug, images, labels)
    assert aug._free.strength == FIRST_STRENGTH, "the first step has no noise whose influence counts"
    step(aug, images, labels)
    moved = float((aug._free.strength / FIRST_STRENGTH).log())
    assert 0.5 * RATE < sign * moved <= RATE * 1.0001
    for _ in range(40):
        step(aug, images, labels)
    assert aug._free.strength <= 1
    assert (aug._free.strength == 1) == (sign > 0)


def test_a_step_without_backward_leaves_no_noise_for_the_next(
    loud: NormalizedModel, images: Tensor, labels: Tensor
) -> None:
    """A loop that skips a loss that is not finite."""
    aug = NullspaceAugment(loud, "free")
    seen = given(loud)
    step(aug, images, labels)
    aug.loss(images, labels, F.cross_entropy)
    assert len(seen[-1]) == 16
    with pytest.warns(UserWarning, match="no gradient reached the images of the step before"):
        step(aug, images, labels)
    assert len(seen[-1]) == 8
    step(aug, images, labels)
    assert len(seen[-1]) == 16


@pytest.mark.parametrize("sizes", [(8, 3, 8), (3, 8, 1)])
def test_batches_of_several_sizes(
    loud: NormalizedModel, images: Tensor, labels: Tensor, sizes: tuple[int, ...]
) -> None:
    """The last batch of an epoch is often smaller."""
    aug = NullspaceAugment(loud, "free")
    seen = given(loud)
    before = 0
    for size in sizes:
        step(aug, images[:size], labels[:size])
        assert len(seen[-1]) == size + min(before, size)
        before = size


def test_a_change_of_the_image_size_costs_one_noisy_view(labels: Tensor) -> None:
    """Progressive resizing."""
    model = create_model("vit_digits", dynamic_img_size=True).train()
    aug = NullspaceAugment(model, "free")
    seen = given(model)
    for side in (16, 16, 24, 24):
        step(aug, torch.rand(8, 3, side, side), labels)
    assert [len(images) for images in seen] == [8, 16, 8, 16]


def test_labels_may_become_probabilities(loud: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    """Mixup that is used in some steps only."""
    soft = F.one_hot(labels, 10).float()
    found = []
    for kinds in ((labels, labels, labels), (labels, soft, labels)):
        aug = NullspaceAugment(copy.deepcopy(loud), "free")
        found.append(torch.stack([step(aug, images, kind) for kind in kinds]))
    torch.testing.assert_close(found[0], found[1])


def test_scaled_losses_and_values_that_are_not_finite(loud: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    """A GradScaler's losses may overflow: an image whose gradient is not a number keeps its start."""
    aug = NullspaceAugment(loud, "free")
    loss, _ = aug.loss(images, labels, F.cross_entropy)
    (loss * 1e38 * 1e5).backward()
    loud.zero_grad()
    assert torch.isfinite(step(aug, images, labels))


@pytest.mark.parametrize("parts", [[(0, 8)], [(0, 5), (5, 8)], [(0, 3), (3, 8)]])
def test_a_state_goes_on_bitwise_however_the_batch_is_split(
    loud: NormalizedModel, images: Tensor, labels: Tensor, parts: list[tuple[int, int]]
) -> None:
    def train(aug: NullspaceAugment, number: int, parts: list[tuple[int, int]]) -> list[Tensor]:
        found = []
        for first, last in parts:
            aug.at(number, Place(torch.arange(first, last), 8))
            loss, _ = aug.loss(images[first:last], labels[first:last], F.cross_entropy)
            loss.backward()
            found.append(aug.stats["norm"] * (last - first))
        return found

    other = copy.deepcopy(loud)
    aug = NullspaceAugment(loud, "free", dtype=torch.float32)
    for number in range(2):
        train(aug, number, [(0, 3), (3, 8)])
    state = aug.state_dict()
    resumed = NullspaceAugment(other, "free", dtype=torch.float32)
    resumed.load_state_dict(copy.deepcopy(state))
    assert resumed.step == aug.step
    before, after = train(aug, 2, [(0, 3), (3, 8)]), train(resumed, 2, parts)
    torch.testing.assert_close(sum(before), sum(after))
    if parts == [(0, 3), (3, 8)]:
        assert torch.equal(torch.stack(before), torch.stack(after))


def test_the_user_s_images_are_left_alone(loud: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    aug = NullspaceAugment(loud, "free")
    own = images.clone()
    for _ in range(2):
        step(aug, own, labels)
    assert torch.equal(own, images)
    assert own.grad is None
    assert not own.requires_grad


def test_batches_in_the_same_memory(loud: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    """A loop that copies every batch into one buffer."""
    other = copy.deepcopy(loud)
    apart, together = NullspaceAugment(loud, "free"), NullspaceAugment(other, "free")
    buffer, classes = images.clone(), labels.clone()
    for shift in range(3):
        buffer.copy_(images.roll(shift, 0))
        classes.copy_(labels.roll(shift, 0))
        assert torch.equal(step(apart, images.roll(shift, 0), labels.roll(shift, 0)), step(together, buffer, classes))


@pytest.mark.parametrize("how", ["views", "outputs", "attach"])
def test_what_needs_no_backward_of_the_loss_is_refused(loud: NormalizedModel, images: Tensor, how: str) -> None:
    aug = NullspaceAugment(loud, "free")
    calls: dict[str, Callable[[], Any]] = {
        "views": lambda: aug.views(images),
        "outputs": lambda: aug.outputs(images, lambda: loud(images)),
        "attach": aug.attach,
    }
    with pytest.raises(RuntimeError, match=f"{how} is not for mode 'free'"):
        calls[how]()


def test_bad_settings_are_refused(loud: NormalizedModel) -> None:
    with pytest.raises(ValueError, match="mode 'free' is for site 'pixels'; got site='patch'"):
        NullspaceAugment(loud, "free", site="patch")
    with pytest.raises(ValueError, match="fraction is for modes of one view: 'free' has two"):
        NullspaceAugment(loud, "free", fraction=0.5)
    with pytest.raises(ValueError, match="noise_fraction is for augmentations of one view: 'free' has noise on half"):
        FinetuneConfig(augment="free", noise_fraction=0.5)
    with pytest.raises(ValueError, match="batch_size must be even with augment 'free'"):
        FinetuneConfig(augment="free", batch_size=7)
    with pytest.raises(ValueError, match="half of batch_size must be divisible by 1 processes x accumulate 4; got 12"):
        make_plan(FinetuneConfig(augment="free", batch_size=12, accumulate=4), 100)
    with pytest.raises(ValueError, match="per_image, boundary; free noise is not synthesised"):
        synthesize(loud, [torch.rand(2, 3, 16, 16)], SynthesisConfig(mode="free", site="pixels"))


@pytest.mark.parametrize("entry", ["strength", "visited"])
def test_a_state_that_lacks_an_entry_is_refused(
    loud: NormalizedModel, images: Tensor, labels: Tensor, entry: str
) -> None:
    aug = NullspaceAugment(loud, "free")
    step(aug, images, labels)
    state = aug.state_dict()
    del state["free"][entry]
    with pytest.raises(ValueError, match="state must be what state_dict"):
        aug.load_state_dict(state)
    assert aug.step == 1
