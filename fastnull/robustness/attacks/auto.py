"""AutoAttack (Croce and Hein 2020), through the optional package pyautoattack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnull.checks import check_choice, check_number
from fastnull.robustness.attacks.base import Victim, check_attack, model_logits, under_attack

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""The published versions: attacks that run in this order, each on the images that are still classified correctly."""


def attacks_for(classes: int, version: str = "standard") -> tuple[str, ...]:
    """The attacks of a version that work with this number of classes.

    The DLR loss needs 3 classes, its targeted form 4. With 3 classes the untargeted APGD replaces the targeted one;
    with 2 neither runs.

    Raises:
        ValueError: fewer than 2 classes, an unknown version.
    """
    check_choice("version", version, VERSIONS)
    check_number("classes of the model under autoattack", classes, 2)
    attacks = VERSIONS[version]
    if classes < 4:
        attacks = tuple(dict.fromkeys("apgd-dlr" if name == "apgd-t" else name for name in attacks))
    if classes < 3:
        attacks = tuple(name for name in attacks if name != "apgd-dlr")
    return attacks


class _Logits(nn.Module):
    """The model with float32 logits as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return model_logits(self.model, images)


def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    version: str = "standard",
    batch_size: int = 250,
    seed: int = 0,
) -> Tensor:
    """APGD-CE, targeted APGD and FAB, and Square, with the package's settings.

    Args:
        model, images, labels, eps, norm: as in `fgsm`; labels are classes [B].
        version: `standard`, `plus` or `rand`; see `attacks_for` for 2 or 3 classes.
        batch_size: images per forward.
        seed: of the package's random numbers. Results depend on the batch.

    Returns:
        [B, C, H, W] in the images' dtype.

    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: as `fgsm`; fewer than 2 classes; an image size that the package's Square attack does not support
            (in L2, some below 25 pixels and some that are not square).
    """
    check_attack(images, eps, norm)
    check_choice("version", version, VERSIONS)
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(f"autoattack needs pyautoattack (pip install pyautoattack): {error}") from error
    if len(images) == 0:
        return images.clone()
    with under_attack(model, images.device):
        victim = Victim(model, images, labels)
        with torch.no_grad():
            classes = victim.logits(victim.clean).shape[1]
        attacks = attacks_for(classes, version)
        if victim.labels.ndim != 1:
            raise ValueError(f"labels must be classes [B]; got shape {list(labels.shape)}")
        if eps == 0:
            return images.clone()
        attack = AutoAttack(
            _Logits(model).eval(), device=str(images.device), eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm],
            seed=seed, version=version,
        )  # fmt: skip
        attack.attacks_to_run = list(attacks)
        if "square" in attacks and norm == "l2":
            _check_size(attack.square, images)
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(
                part.n_target_classes, classes - 1
            )  # 9 by default, which fails with fewer classes
        found, _ = attack.run_standard_evaluation(victim.clean, victim.labels, batch_size=batch_size)
        return victim.finish(found.to(images.device))


def _check_size(square: Any, images: Tensor) -> None:
    """Run the first step of Square on a blank image, because Square runs last and fails for some sizes.

    Raises:
        ValueError: the size is not supported.
    """
    blank = torch.zeros_like(images[:1], dtype=torch.float32)
    # logits [B, 2] of class 0 for a blank image and 1 for any other
    model, square.predict = square.predict, lambda x: F.one_hot((x != 0).flatten(1).any(1).long(), 2).float()
    try:
        square.seed = 0
        square.perturb(blank, torch.zeros(1, dtype=torch.long, device=images.device))
    except (RuntimeError, ZeroDivisionError) as error:
        height, width = images.shape[2:]
        raise ValueError(
            f"autoattack in l2 does not support images of {height}x{width}: the tiles of pyautoattack's Square attack "
            "do not fill them; use norm linf, or another attack"
        ) from error
    finally:
        square.predict = model
