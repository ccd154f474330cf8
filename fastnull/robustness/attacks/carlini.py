"""The L2 attack of Carlini and Wagner (2017): the smallest change that causes a misclassification."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnull.checks import check_images, check_number
from fastnull.robustness.attacks.base import Victim, length, per_image, under_attack


def cw_l2(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    confidence: float = 0.0,
    steps: int = 100,
    search_steps: int = 5,
    lr: float = 0.01,
    initial_const: float = 1e-2,
    targeted: bool = False,
) -> Tensor:
    """Minimise ‖change‖² + c · margin in tanh space with Adam, and a binary search for c per image.

    Args:
        model, images, labels, targeted: as in `fgsm`; labels are classes [B].
        confidence: required lead of the wrong logit (the target).
        steps: Adam steps per value of c.
        search_steps: number of values of c.
        lr: of Adam, in tanh space.
        initial_const: first c.

    Returns:
        [B, C, H, W] in the images' dtype: the nearest success of each image, else the image itself. There is no eps.

    Raises:
        ValueError: images outside [0, 1], labels out of range, NaN logits, settings out of range.
    """
    check_images(images)
    check_number("steps", steps, 1)
    check_number("search_steps", search_steps, 1)
    check_number("confidence", confidence, 0)
    check_number("lr", lr, 0, exclusive=True)
    check_number("initial_const", initial_const, 0, exclusive=True)
    if len(images) == 0:
        return images.clone()
    with under_attack(model, images.device):
        victim = Victim(model, images, labels, targeted=targeted)
        clean = victim.clean
        success, _ = victim.score(clean)
        if victim.labels.ndim != 1:
            raise ValueError(f"labels must be classes [B]; got shape {list(labels.shape)}")
        # 1 - 1e-6: black and white are at infinity
        origin = torch.atanh((2 * clean - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        result, nearest = clean, torch.full_like(per_image(clean[:, 0, 0, 0]), torch.inf)
        if confidence == 0:
            nearest = torch.where(per_image(success), 0, nearest)  # already misclassified: no change is needed
        low = torch.zeros_like(nearest)
        high = torch.full_like(nearest, torch.inf)
        const = torch.full_like(nearest, initial_const)
        for _ in range(search_steps):
            point = origin.clone().requires_grad_(True)
            adam = torch.optim.Adam([point], lr=lr)
            reached = torch.zeros_like(nearest, dtype=torch.bool)
            for _ in range(steps):
                adversarial = (point.tanh() + 1) / 2
                squared = length(adversarial - clean).square()
                margin = per_image(_margin(victim, victim.logits(adversarial)))
                loss = (squared + const * (margin + confidence).clamp_min(0)).sum()
                with torch.no_grad():
                    fooled = margin < -confidence if confidence else margin < 0
                    better = fooled & (squared < nearest)
                    result = torch.where(better, adversarial, result)
                    nearest = torch.where(better, squared, nearest)
                    reached |= fooled
                (point.grad,) = torch.autograd.grad(loss, point)
                adam.step()
            high = torch.where(reached, torch.minimum(high, const), high)
            low = torch.where(reached, low, torch.maximum(low, const))
            const = torch.where(high.isinf(), const * 10, (low + high) / 2)
        return victim.finish(result)


def _margin(victim: Victim, logits: Tensor) -> Tensor:
    """[B]: how far the logits are from success; negative means misclassified (or the target reached)."""
    own = logits.gather(1, victim.labels[:, None])[:, 0]
    other = logits.scatter(1, victim.labels[:, None], -torch.inf).amax(1)
    return other - own if victim.targeted else own - other
