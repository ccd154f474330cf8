"""Steps, epochs and cost of a finetuning run, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from fastnull.finetune.config import ATTACKS, FinetuneConfig

FORWARD, INPUT_BACKWARD, FULL_BACKWARD = 1, 1, 2
"""Cost per image in forward passes: the input gradient costs 1, the weight gradient 1 more."""
REFRESH_COST = 2 * FORWARD + INPUT_BACKWARD
"""Cost per image and update of a universal noise: clean logits, noisy logits, input gradient."""


@dataclass(frozen=True)
class Plan:
    """The number of steps of a run and their cost, in forward passes of one image.

    Attributes:
        steps, steps_per_epoch, epochs: the last epoch may be incomplete.
        batch_size: that of the configuration (`free`: half of it, the new images), or all images of an epoch if these
            are fewer.
        step_cost: per image and step, including synthesis; mean over a batch.
        refresh_cost: of learning a universal bank once, at most (it stops when ε is met).
        total_cost: of the run.
        budget: cost allowed by compute_budget; None without it.
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
    """Forward passes per image and step; mean over a batch.

    A view costs 3 (forward, full backward); `none` and `noise_fraction` have one view, all others two. `free` has the
    noisy one in the next step, with noise that costs no pass. `boundary`, `per_image` and `adversarial` add a forward
    and an input gradient per step of their search, `trades` the clean probabilities too. `boundary` and `per_image` add
    a forward for clean logits if there is no clean view, or drop_path in it. With `noise_fraction` only that fraction
    of the images has the cost of the search.
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
    """Number of views of an image in a step."""
    return 1 if config.augment == "none" or config.fraction else 2


def refresh_cost(config: FinetuneConfig, images: int, batch_size: int) -> int:
    """Maximum number of forward passes to learn a universal bank from a training set of `images`; 0 for other modes."""
    synthesis = config.synthesis()
    if config.augment != "universal" or synthesis is None:
        return 0
    per_round = max(1, int(synthesis.image_fraction * (images // batch_size)))
    steps = synthesis.steps or synthesis.rounds * per_round
    return steps * batch_size * REFRESH_COST


def make_plan(config: FinetuneConfig, images: int, processes: int = 1) -> Plan:
    """Compute the steps of a run on a training set of `images`, split over `processes`.

    With `compute_budget` the run takes as many steps as cost at most budget x images, so runs with the same budget cost
    the same. A universal bank is counted with its maximum number of steps.

    Raises:
        ValueError: no images, a budget below the cost of one step, a batch size that is not divisible by processes x
            accumulate, or fewer images than these.
    """
    if images < 1:
        raise ValueError("the training data holds no images")
    per_epoch = max(1, int(config.train_fraction * images))
    parts = processes * config.accumulate
    wanted = config.batch_size // 2 if config.augment == "free" else config.batch_size
    if wanted % parts:
        raise ValueError(
            f"{'half of ' if config.augment == 'free' else ''}batch_size must be divisible by {processes} processes x "
            f"accumulate {config.accumulate}; got {config.batch_size}"
        )
    if per_epoch < parts:
        raise ValueError(
            f"{processes} processes x accumulate {config.accumulate} need at least one image each per step; "
            f"an epoch has {per_epoch}"
        )
    batch_size = min(wanted, per_epoch)
    batch_size -= batch_size % parts
    if config.mixing:
        # each process mixes its own images
        batch_size -= batch_size % (2 * processes * config.accumulate)
        if batch_size == 0:
            raise ValueError(
                f"mixup and cutmix pair images: a step needs at least two for each of {processes} processes x "
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
                f"compute_budget {config.compute_budget:g} ({budget:g} forward passes) is less than the cost of "
                f"one step, {cost + refresh} with augment={config.augment!r}"
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
