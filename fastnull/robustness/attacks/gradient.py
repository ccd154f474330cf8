"""Gradient attacks in a ball: FGSM (Goodfellow et al. 2015), PGD (Madry et al. 2018), MI-FGSM (Dong et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnull.checks import check_number
from fastnull.robustness.attacks.base import (
    Best,
    Criterion,
    Starts,
    Victim,
    check_attack,
    direction,
    per_image,
    project,
    scaled,
    under_attack,
    within,
)


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    norm: str = "linf",
    *,
    targeted: bool = False,
    criterion: Criterion | None = None,
) -> Tensor:
    """One step of size eps along the sign of the gradient (`linf`) or along the gradient itself (`l2`).

    Args:
        model: pixels in [0, 1] → logits [B, K] (or an output with `.logits`).
        images: [B, C, H, W], pixels in [0, 1].
        labels: true classes [B] or soft labels [B, K]; the classes to reach where `targeted`.
        eps: radius, in units of pixels in [0, 1] (8/255); 0 returns the images.
        norm: `linf` or `l2`.
        criterion: (logits, labels) → loss per image [B]; None: the cross entropy, in float32 or better.

    Raises:
        ValueError: images outside [0, 1], labels out of range, eps outside [0, 1] (`linf`), NaN logits.
    """
    check_attack(images, eps, norm)
    if len(images) == 0:
        return images.clone()
    with under_attack(model, images.device):
        victim = Victim(model, images, labels, targeted=targeted, criterion=criterion)
        gradient, _, _ = victim.gradient(victim.clean)
        if eps == 0:
            return images.clone()
        change = within(eps * direction(gradient, norm), eps, norm)
        return victim.finish((victim.clean + change).clamp(0, 1))


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    step_size: float | None = None,
    steps: int = 10,
    norm: str = "linf",
    restarts: int = 1,
    random_start: bool = True,
    targeted: bool = False,
    criterion: Criterion | None = None,
    generator: torch.Generator | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent: step, project to the ball around the images, clamp to [0, 1].

    With several restarts every image keeps its best end point: a success before a failure, then the larger loss.

    Args:
        model, images, labels, eps, norm, targeted, criterion: as in `fgsm`.
        step_size: in pixels; None: eps / 4.
        steps: gradient steps per restart.
        random_start: start at a uniform point of the ball, else (first restart only) at the images.
        generator: of the random starts. Without one they depend only on (seed, index of the image, restart), so an
            image has the same start in every batch; in a training loop give a new seed every step.
        indices: [B] integers that identify the images; None: 0 .. B-1.

    Returns:
        [B, C, H, W] in the images' dtype. Steps are taken in float32 or better, so half precision rounds once, at the
        end. In a float16 model gradients of confident predictions vanish, and the attack looks weak.

    Raises:
        ValueError: as `fgsm`; a step_size below 0; steps or restarts below 1.
    """
    check_attack(images, eps, norm)
    check_number("steps", steps, 1)
    check_number("restarts", restarts, 1)
    step = eps / 4 if step_size is None else step_size
    check_number("step_size", step, 0)
    if len(images) == 0:
        return images.clone()
    with under_attack(model, images.device):
        victim = Victim(model, images, labels, targeted=targeted, criterion=criterion)
        starts = Starts(victim.clean, generator, seed, indices)
        if eps == 0:
            victim.score(victim.clean)
            return images.clone()
        best = Best(victim.clean)
        for restart in range(restarts):
            adversarial = starts.point(eps, norm) if random_start or restart else victim.clean
            for _ in range(steps):
                gradient, _, _ = victim.gradient(adversarial)
                adversarial = project(adversarial + step * direction(gradient, norm), victim.clean, eps, norm)
            if restarts == 1:
                return victim.finish(adversarial)
            best.offer(adversarial, *victim.score(adversarial))
        return victim.finish(best.images)


def mi_fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 10,
    decay: float = 1.0,
    norm: str = "linf",
    targeted: bool = False,
    criterion: Criterion | None = None,
) -> Tensor:
    """Momentum iterative FGSM: steps of eps / steps along the running sum of gradients of unit mean magnitude.

    Args:
        model, images, labels, eps, norm, targeted, criterion: as in `fgsm`.
        decay: weight of the old momentum.

    Raises:
        ValueError: as `fgsm`; steps below 1, decay below 0.
    """
    check_attack(images, eps, norm)
    check_number("steps", steps, 1)
    check_number("decay", decay, 0)
    if len(images) == 0:
        return images.clone()
    with under_attack(model, images.device):
        victim = Victim(model, images, labels, targeted=targeted, criterion=criterion)
        if eps == 0:
            victim.score(victim.clean)
            return images.clone()
        adversarial, momentum = victim.clean, torch.zeros_like(victim.clean)
        for _ in range(steps):
            gradient, _, _ = victim.gradient(adversarial)
            near_one, _ = scaled(gradient)
            magnitude = per_image(near_one.abs().mean((1, 2, 3)))
            momentum = decay * momentum + near_one / magnitude.clamp_min(torch.finfo(gradient.dtype).tiny)
            adversarial = project(adversarial + eps / steps * direction(momentum, norm), victim.clean, eps, norm)
        return victim.finish(adversarial)
