"""The cost of a run: budgets, and the counted forward passes against those of the model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.config import AUGMENTS
from fastnull.finetune.plan import make_plan
from fastnull.models import create_model
from tests.finetune.runs import (
    small,
)

# The cost of an image in a step, counted by hand: a view 3 (forward 1, backward 2), the clean logits 1, a step of
# synthesis or attack 2 (forward 1, input gradient 1).
COSTS = {
    "none": 3, "random": 6, "universal": 6, "per_image": 6 + 8, "boundary": 6 + 8, "adversarial": 6 + 6,
    "trades": 6 + 1 + 6, "free": 6,
}  # fmt: skip


COUNTED = {"per_image": {"steps": 4}, "boundary": {"steps": 4}, "universal": {"image_fraction": 0.1}}


@pytest.mark.parametrize("augment", AUGMENTS)
def test_equal_budgets_cost_the_same(augment):
    config = FinetuneConfig(
        augment=augment, noise=COUNTED.get(augment), site="pixels" if augment == "free" else "patch", attack_steps=3,
        compute_budget=60.0, epochs=1,
    )  # fmt: skip
    plan = make_plan(config, 1000)
    assert plan.step_cost == COSTS[augment]
    dropping = make_plan(replace(config, drop_path=0.1), 1000).step_cost
    assert dropping == plan.step_cost + (augment in ("per_image", "boundary"))
    assert plan.budget == 60_000
    assert plan.total_cost <= plan.budget
    # no further step fits
    assert plan.total_cost + plan.step_cost * plan.batch_size + plan.refresh_cost > plan.budget
    assert plan.epochs == math.ceil(plan.steps / plan.steps_per_epoch)
    if augment == "universal":
        # 3 rounds of a tenth of 15 batches of 64 images, each costing clean and noisy logits and a gradient
        assert plan.refresh_cost == 3 * 1 * 64 * 3


ONE_VIEW_COSTS = {"random": 3, "universal": 3, "per_image": 3 + 9 / 4, "boundary": 3 + 9 / 4, "adversarial": 3 + 6 / 4}


@pytest.mark.parametrize("augment", ONE_VIEW_COSTS)
def test_one_view_costs_half_and_its_fraction_of_the_search(augment):
    config = FinetuneConfig(
        augment=augment, noise=COUNTED.get(augment), site="patch", attack_steps=3, compute_budget=60.0,
        noise_fraction=0.25,
    )  # fmt: skip
    assert make_plan(config, 1000).step_cost == ONE_VIEW_COSTS[augment]


def test_boundary_noise_in_pixels_takes_one_view_unless_two_are_asked_for():
    config = FinetuneConfig(site="pixels")
    assert (config.fraction, make_plan(config, 1000).step_cost) == (0.5, 3 + 3 / 2)
    two = replace(config, noise_fraction=0.0)
    assert (two.fraction, make_plan(two, 1000).step_cost) == (0, 6 + 2)
    assert (FinetuneConfig(site="patch").fraction, FinetuneConfig(augment="random", site="pixels").fraction) == (0, 0)


def test_budget_is_spent_as_planned(few):
    config = small("boundary", num_classes=10, compute_budget=27.0, epochs=1)
    result = finetune(config, train_data=few)
    # 43 images x 27 = 1161; a step costs 16 x (6 + 4) = 160: seven steps, the last in the fourth epoch
    assert result.plan.steps == 7
    assert result.cost == {"planned": 7 * 160, "spent": 7 * 160, "budget": 1161}
    assert [record["step"] for record in result.history] == [2, 4, 6, 7]
    with pytest.raises(ValueError, match="less than the cost of one step"):
        make_plan(replace(config, compute_budget=1.0), 43)


def test_the_counted_passes_are_the_passes_made(few, monkeypatch):
    """The accounting against the model itself: forwards of the first block, in images, over one step."""
    seen = []
    two_views = ("none", "random", "boundary", "per_image", "adversarial", "trades")
    cases = [(augment, None) for augment in two_views]
    cases += [(augment, 0.5) for augment in ("random", "boundary", "per_image", "adversarial")]
    for augment, fraction in cases:
        model = create_model("vit_digits", num_classes=10)
        passed: list[int] = []
        model.network.blocks[0].register_forward_pre_hook(lambda _, args, to=passed: to.append(len(args[0])))
        config = small(augment, num_classes=10, epochs=1, val_fraction=0.0, train_fraction=1 / 3)
        config = replace(config, noise_fraction=fraction)
        config = replace(config, backend="reference")  # the other backends do not call the model's own modules
        plan = make_plan(config, 48)
        assert plan.steps == 1
        finetune(config, model, train_data=few)
        # forwards alone: of a view's 3 one, of a synthesis step's 2 one; and one image that tries the model out
        views = 1 if augment == "none" or fraction else 2
        synthesis = (plan.step_cost - 3 * views) / (fraction or 1)
        expected = views + (fraction or 1) * (synthesis % 2 + synthesis // 2)
        seen.append((augment, (sum(passed) - 1) / plan.batch_size, expected))
    assert all(made == expected for _, made, expected in seen), seen
