"""A single-patch attack in the spirit of Patch-Fool (Fu et al. 2022): few patches, changed without limit.

Patch-Fool picks the patch by attention and adds an attention loss; here the patch is picked by the gradient of the
cross entropy with respect to its pixels and that loss alone is raised, so that every model can be attacked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnull.checks import check_images, check_number
from fastnull.robustness.attacks.base import Best, Victim, under_attack


def patch_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    patch_size: int | None = None,
    patches: int = 1,
    steps: int = 50,
    lr: float = 0.05,
    targeted: bool = False,
) -> Tensor:
    """Optimise the pixels of the most sensitive patches with Adam, anywhere within [0, 1].

    Args:
        model, images, labels, targeted: as in `fgsm`. Both sides of the images are multiples of `patch_size`.
        patch_size: in pixels; None is the model's own (for models that fastnull.vit can split).
        patches: how many patches of the model's grid may change.
        steps, lr: of Adam, in pixels.

    Returns:
        [B, C, H, W] in the images' dtype: of the points visited a success before a failure, then the largest loss.

    Raises:
        ValueError: images outside [0, 1] or no multiple of the patch, labels out of range, NaN logits, more patches
            than there are.
    """
    check_images(images)
    check_number("steps", steps, 1)
    check_number("lr", lr, 0, exclusive=True)
    if patch_size is None:
        from fastnull.vit import split

        patch_size = int(split(model).projection.kernel_size[0])
    check_number("patch_size", patch_size, 1)
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"images must have sides that are multiples of patch_size {patch_size}; got {height}x{width}")
    grid = (height // patch_size, width // patch_size)
    check_number("patches", patches, 1, grid[0] * grid[1])
    if len(images) == 0:
        return images.clone()
    with under_attack(model, images.device):
        victim = Victim(model, images, labels, targeted=targeted)
        gradient, _, _ = victim.gradient(victim.clean)
        blocks = gradient.square().unflatten(3, (grid[1], patch_size)).unflatten(2, (grid[0], patch_size))
        sensitivity = blocks.sum((1, 3, 5)).flatten(1)  # [B, C, gh, p, gw, p] → [B, gh gw]
        chosen = torch.zeros_like(sensitivity).scatter_(1, sensitivity.topk(patches, dim=1).indices, 1)
        mask = chosen.view(-1, 1, *grid)
        mask = mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)  # [B, 1, H, W]
        point = victim.clean.clone().requires_grad_(True)
        adam = torch.optim.Adam([point], lr=lr)
        best = Best(victim.clean)
        for _ in range(steps):
            gradient, loss, logits = victim.gradient(point)
            best.offer(point.detach().clone(), victim.success(logits), loss)
            point.grad = -gradient * mask  # Adam descends
            adam.step()
            with torch.no_grad():
                point.clamp_(0, 1)
        best.offer(point.detach(), *victim.score(point.detach()))
        return victim.finish(best.images)
