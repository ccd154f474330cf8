"""APGD (Croce and Hein 2020): projected gradient with momentum and a step size that halves when progress stops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastnull.checks import check_choice, check_number
from fastnull.robustness.attacks.base import (
    Best,
    Criterion,
    Starts,
    Victim,
    check_attack,
    direction,
    length,
    per_image,
    project,
    under_attack,
)

if TYPE_CHECKING:
    from fastnull.encoder.frozen import FrozenEncoder

LOSSES = ("ce", "dlr", "dlr_targeted")

MOMENTUM = 0.75  # weight of the new step; the rest is that of the last step
RHO = 0.75  # fraction of the steps in a window that must raise the loss


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    loss: str = "ce",
    steps: int = 100,
    norm: str = "linf",
    restarts: int = 1,
    targets: int = 9,
    generator: torch.Generator | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    leave: bool = False,
    encoder: FrozenEncoder | None = None,
) -> Tensor:
    """Auto-PGD, which needs no step size. A success that was found is kept.

    Args:
        model, images, eps, norm, generator, seed, indices, encoder: as in `pgd`.
        labels: true classes [B].
        loss: `ce`; `dlr`, the difference of logits ratio, which does not vanish for confident predictions
            (3 classes or more); `dlr_targeted`, once for each of the `targets` most likely wrong classes (4 or more).
        steps: gradient steps per restart and target.
        targets: number of targets of `dlr_targeted`; at most K - 1 are used.
        leave: an image is attacked until its first success, which is returned; the same images succeed.

    Returns:
        [B, C, H, W] in the images' dtype: the success of the largest loss, else the point of it.

    Raises:
        ValueError: as `pgd`; an unknown loss; too few classes for it; soft labels.
    """
    check_attack(images, eps, norm)
    check_choice("loss", loss, LOSSES)
    for name, value in (("steps", steps), ("restarts", restarts), ("targets", targets)):
        check_number(name, value, 1)
    if len(images) == 0:
        return images.clone()
    with under_attack(model, images.device):
        victim = Victim(model, images, labels, encoder=encoder)
        with torch.no_grad():
            clean_logits = victim.logits(victim.clean)
        classes = clean_logits.shape[1]
        needed = {"ce": 2, "dlr": 3, "dlr_targeted": 4}[loss]
        if classes < needed:
            raise ValueError(f"loss {loss!r} needs {needed} classes or more; the model has {classes}")
        if victim.labels.ndim != 1:
            raise ValueError(f"labels must be classes [B]; got shape {list(labels.shape)}")
        if eps == 0:
            return images.clone()
        goals = [victim.labels]
        if loss == "dlr_targeted":
            wrong = clean_logits.scatter(1, victim.labels[:, None], -math.inf)
            likely = wrong.topk(min(targets, classes - 1), dim=1).indices  # [B, T]
            goals = [torch.stack([victim.labels, target], 1) for target in likely.unbind(1)]
        criterion = {"ce": None, "dlr": dlr_loss, "dlr_targeted": targeted_dlr_loss}[loss]
        starts = Starts(victim, generator, seed, indices)
        best = None if leave else Best(victim.clean)
        point = victim.clean
        for goal in goals * restarts:
            point = _run(victim, starts, best, criterion, goal[victim.rows], eps, steps, norm)
            if not len(point):
                break
        return victim.finish(point if best is None else best.images)


def _run(
    victim: Victim, starts: Starts, best: Best | None, criterion: Criterion | None, goal: Tensor, eps: float,
    steps: int, norm: str,
) -> Tensor:  # fmt: skip
    """One start of APGD (algorithm 1 of the paper) with the labels `goal`, [B] or as the criterion takes them.

    Points are offered to `best`; without one, images that are fooled leave. Returns the last points.
    """
    noise = starts.uniform()
    # as published: uniform noise scaled to the surface of the ball
    size = per_image(noise.abs().amax((1, 2, 3))) if norm == "linf" else length(noise)
    point = (victim.clean + eps * noise / size).clamp(0, 1)
    previous = point
    gradient, loss, logits = victim.gradient(point, criterion, goal)
    top_point, top_loss, top_gradient = point, loss, gradient
    step = torch.full_like(loss, 2 * eps, dtype=point.dtype)
    last_step, last_top = step, top_loss
    rises = torch.zeros_like(loss)
    ends = _checkpoints(steps)
    window_start = 0
    for k in range(steps):
        if best is not None:
            best.offer(point, victim.success(logits), loss)
        else:
            (
                point, previous, gradient, loss, top_point, top_loss, top_gradient, step, last_step, last_top, rises,
                goal,
            ) = victim.leave(
                victim.success(logits), point, previous, gradient, loss, top_point, top_loss, top_gradient, step,
                last_step, last_top, rises, goal,
            )  # fmt: skip
            if not len(point):
                return point
        if k in ends:
            stuck = rises < RHO * (k - window_start)
            still = (last_step == step) & (last_top >= top_loss)
            halve = stuck | still
            last_step, last_top = step, top_loss
            step = torch.where(halve, step / 2, step)
            # continue from the best point
            point = torch.where(per_image(halve), top_point, point)
            gradient = torch.where(per_image(halve), top_gradient, gradient)
            loss = torch.where(halve, top_loss, loss)
            rises = torch.zeros_like(rises)
            window_start = k
        weight = MOMENTUM if k else 1.0
        moved = project(point + per_image(step) * direction(gradient, norm), victim.clean, eps, norm)
        mixed = point + weight * (moved - point) + (1 - weight) * (point - previous)
        previous, point = point, project(mixed, victim.clean, eps, norm)
        last_loss = loss
        gradient, loss, logits = victim.gradient(point, criterion, goal)
        rises += loss > last_loss
        higher = loss > top_loss
        top_point = torch.where(per_image(higher), point, top_point)
        top_gradient = torch.where(per_image(higher), gradient, top_gradient)
        top_loss = torch.where(higher, loss, top_loss)
    if best is None:
        return victim.leave(victim.success(logits), point)[0]
    best.offer(point, victim.success(logits), loss)
    return point


def _checkpoints(steps: int) -> set[int]:
    """Steps after which progress is checked: windows of .22, .19, .16, … .06 of all steps."""
    ends, fraction, window = set(), 0.0, 0.22
    while fraction + window <= 1:
        fraction += window
        ends.add(math.ceil(fraction * steps))
        window = max(window - 0.03, 0.06)
    return ends


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-(z_y - max of the others) / (z_1st - z_3rd); [B, K], [B] → [B]. Unchanged by shifts and scales of the logits."""
    ordered = logits.sort(dim=1, descending=True).values
    own = logits.gather(1, labels[:, None])[:, 0]
    right = logits.argmax(1) == labels
    other = torch.where(right, ordered[:, 1], ordered[:, 0])
    return -(own - other) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2), with labels [B, 2]: the true class y and the target t."""
    ordered = logits.sort(dim=1, descending=True).values
    own, target = logits.gather(1, labels).unbind(1)
    return -(own - target) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)
