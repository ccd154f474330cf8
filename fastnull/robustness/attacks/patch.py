"""A patch attack similar to Patch-Fool (Fu et al. 2022): few patches, changed without limit.

Patch-Fool chooses the patch by attention and adds an attention loss. Here the patch is chosen by the gradient of the
cross entropy with respect to its pixels and only that loss is maximised, which works for every model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull.checks import check_images, check_number
from fastnull.robustness.attacks.base import Best, Victim, model_dtype, scaled, under_attack
from fastnull.vit import frozen, split


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
        model, images, labels, targeted: as in `fgsm`.
        patch_size: in pixels; None: the image area of a token of the model (see `token_area`).
        patches: number of patches of the grid that may change. Pixels right of and below the last whole patch, which a
            patch embedding drops, stay as they are.
        steps, lr: of Adam, in pixels.

    Returns:
        [B, C, H, W] in the images' dtype: a success if one was found, then the largest loss.

    Raises:
        ValueError: images outside [0, 1] or smaller than a patch, labels out of range, NaN logits, more patches
            than there are, or no patch_size for a model whose tokens have no known area.
    """
    check_images(images)
    check_number("steps", steps, 1)
    check_number("lr", lr, 0, exclusive=True)
    if len(images) == 0:
        return images.clone()
    if patch_size is None:
        patch_size = token_area(model, images)
    check_number("patch_size", patch_size, 1)
    height, width = images.shape[2:]
    if patch_size > min(height, width):
        raise ValueError(f"patch_size must be at most the sides of the images, {height}x{width}; got {patch_size}")
    grid = (height // patch_size, width // patch_size)
    border = (0, width % patch_size, 0, height % patch_size)  # right and below
    check_number("patches", patches, 1, grid[0] * grid[1])
    with under_attack(model, images.device):
        victim = Victim(model, images, labels, targeted=targeted)
        gradient, _, _ = victim.gradient(victim.clean)
        gradient, _ = scaled(gradient)  # its squares would be 0 for confident predictions
        whole = gradient[..., : grid[0] * patch_size, : grid[1] * patch_size]
        blocks = whole.square().unflatten(3, (grid[1], patch_size)).unflatten(2, (grid[0], patch_size))
        sensitivity = blocks.sum((1, 3, 5)).flatten(1)  # [B, C, gh, p, gw, p] → [B, gh gw]
        chosen = torch.zeros_like(sensitivity).scatter_(1, sensitivity.topk(patches, dim=1).indices, 1)
        mask = chosen.view(-1, 1, *grid)
        mask = mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        mask = F.pad(mask, border)  # [B, 1, H, W]
        point = victim.clean.clone().requires_grad_(True)
        adam = torch.optim.Adam([point], lr=lr)
        best = Best(victim.clean)
        for _ in range(steps):
            gradient, loss, logits = victim.gradient(point)
            best.offer(point.detach().clone(), victim.success(logits), loss)
            # Adam minimises, and does not move if gradients are far below its eps of 1e-8
            point.grad = -scaled(gradient * mask)[0]
            adam.step()
            with torch.no_grad():
                point.clamp_(0, 1)
        best.offer(point.detach(), *victim.score(point.detach()))
        return victim.finish(best.images)


def token_area(model: nn.Module, images: Tensor) -> int:
    """Side, in pixels, of the square of an image [B, C, H, W] that one patch token represents.

    It is the ratio that the patch embedding states, or the product of its strides. The receptive field may be larger
    (overlapping patches, a CNN before the ViT); the squares tile the image, up to a border right and below that is
    narrower than a square.

    Raises:
        ValueError: no adapter of fastnull.vit finds patch tokens, or they do not tile the images.
    """
    adapter = split(model)
    module = adapter.patch_module
    if hasattr(module, "feat_ratio"):  # timm's plain and hybrid embeddings
        area = tuple(module.feat_ratio(as_scalar=False))
    else:
        steps = [_pair(layer.stride) for layer in module.modules() if isinstance(layer, _STRIDED)]
        area = math.prod(down for down, _ in steps), math.prod(right for _, right in steps)
    height, width = images.shape[2:]
    grid = height // area[0], width // area[1]
    with torch.no_grad(), frozen(model):
        shape = list(adapter.patch(images[:1].to(model_dtype(model) or images.dtype)).shape)  # [1, N, D] or a map
    found = [*grid] in (shape[1:3], shape[2:4]) if len(shape) == 4 else shape[1] == grid[0] * grid[1]
    if area[0] != area[1] or not found:
        raise ValueError(
            f"the tokens of {type(adapter.network).__name__}, {shape}, do not tile images of {height}x{width} in "
            f"squares (one every {area[0]}x{area[1]} pixels), and have no patch of their own: give patch_size"
        )
    return area[0]


_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def _pair(stride: int | tuple[int, int]) -> tuple[int, int]:
    return (stride, stride) if isinstance(stride, int) else stride
