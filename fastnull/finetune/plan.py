"""What a finetuning run costs: steps, epochs and forward passes, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from fastnull.finetune.config import ATTACKS, FinetuneConfig

FORWARD, INPUT_BACKWARD, FULL_BACKWARD = 1, 1, 2
"""Costs for one image, in forward passes: a backward pass costs a forward for the inputs and one for the weights."""
REFRESH_COST = 2 * FORWARD + INPUT_BACKWARD
"""Of one image in one update of a universal noise: clean logits, noisy logits, input gradient."""


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes and what they cost, in forward passes of the model for one image.

    Attributes:
        steps, steps_per_epoch, epochs: the last epoch may be a part of one.
        batch_size: of every step: the configuration's, or all images of an epoch where they are fewer.
        step_cost: of one image in one step, synthesis in it included; the mean over a batch.
        refresh_cost: of learning a universal bank once, at most (it stops where ε is met).
        total_cost: of the run.
        budget: what compute_budget allows for the run, where it set the steps; else None.
    """

    steps: int
    steps_per_epoch: int
    epochs: int
    batch_size: int
    step_cost: float
    refresh_cost: int
    total_cost: float
    budget: float | None


def step_cost(config: FinetuneConfig) -> float:
    """Forward passes that one image costs in one step; the mean over a batch.

    A view costs 3 (forward, full backward); `none` and `noise_fraction` train one, all else two. `boundary`,
    `per_image` and `adversarial` add a forward and an input gradient per step of their search, `trades` the clean
    probabilities too. Where no clean view gives `boundary` and `per_image` their clean logits (there is none, or it has
    drop_path in it), they make them. With `noise_fraction` only that fraction of the images pays for the search.
    """
    view = FORWARD + FULL_BACKWARD
    views = views_of(config)
    search = FORWARD + INPUT_BACKWARD
    synthesis = config.synthesis()
    made = 0
    if config.augment in ATTACKS:
        made = search * config.attack_steps + (FORWARD if config.augment == "trades" else 0)
    elif config.augment in ("boundary", "per_image") and synthesis is not None and synthesis.steps is not None:
        made = search * synthesis.steps + (FORWARD if config.drop_path or views == 1 else 0)
    return views * view + (config.fraction * made if config.fraction else made)


def views_of(config: FinetuneConfig) -> int:
    """How often a step sees an image."""
    return 1 if config.augment == "none" or config.fraction else 2


def refresh_cost(config: FinetuneConfig, images: int, batch_size: int) -> int:
    """Most forward passes of learning a universal bank once from a training set of `images`; 0 for other modes."""
    synthesis = config.synthesis()
    if config.augment != "universal" or synthesis is None:
        return 0
    per_round = max(1, int(synthesis.image_fraction * (images // batch_size)))
    steps = synthesis.steps or synthesis.rounds * per_round
    return steps * batch_size * REFRESH_COST


def make_plan(config: FinetuneConfig, images: int, processes: int = 1) -> Plan:
    """Derive the steps of a run on a training set of `images`, which `processes` share out.

    With `compute_budget` the steps are the most whose cost is within budget x images, whatever the augmentation, so
    that runs with the same budget cost the same. A universal bank is counted at the steps it may take.

    Raises:
        ValueError: no images, a budget that does not pay for one step, a batch that does not divide by the processes
            and the parts of `accumulate`, or fewer images than those.
    """
    if images < 1:
        raise ValueError("the training data holds no images")
    per_epoch = max(1, int(config.train_fraction * images))
    shards = processes * config.accumulate
    if config.batch_size % shards:
        raise ValueError(
            f"batch_size must divide by the {processes} processes x accumulate {config.accumulate}; "
            f"got {config.batch_size}"
        )
    if per_epoch < shards:
        raise ValueError(
            f"{processes} processes x accumulate {config.accumulate} need an image each in a step; "
            f"an epoch has {per_epoch}"
        )
    batch_size = min(config.batch_size, per_epoch)
    batch_size -= batch_size % shards
    if config.mixing:
        # each process mixes its own images
        batch_size -= batch_size % (2 * processes * config.accumulate)
        if batch_size == 0:
            raise ValueError(
                f"mixup and cutmix pair images: a step must hold at least two for each of {processes} processes x "
                f"accumulate {config.accumulate}"
            )
    steps_per_epoch = per_epoch // batch_size
    cost, refresh = step_cost(config) * batch_size, refresh_cost(config, images, batch_size)
    steps, budget = config.epochs * steps_per_epoch, None
    if config.compute_budget is not None:
        budget = config.compute_budget * images
        full_epochs = int(budget // (steps_per_epoch * cost + refresh))
        rest = budget - full_epochs * (steps_per_epoch * cost + refresh)
        steps = full_epochs * steps_per_epoch + max(0, int((rest - refresh) // cost))
        if steps == 0:
            raise ValueError(
                f"compute_budget {config.compute_budget:g} ({budget:g} forward passes) does not pay for one step, "
                f"which costs {cost + refresh} with augment={config.augment!r}"
            )
    epochs = -(-steps // steps_per_epoch)
    return Plan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        batch_size=batch_size,
        step_cost=step_cost(config),
        refresh_cost=refresh,
        total_cost=steps * cost + epochs * refresh,
        budget=budget,
    )
