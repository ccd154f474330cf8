"""AutoAttack (Croce and Hein 2020), by the package pyautoattack where it is installed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnull.checks import check_choice
from fastnull.robustness.attacks.base import Victim, check_attack, model_logits, under_attack


class _Logits(nn.Module):
    """The model as the package calls it: float32 logits, whatever the model returns."""

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
    """APGD-CE, targeted APGD and FAB, and Square, in the package's own settings.

    Args:
        model, images, labels, eps, norm: as in `fgsm`; labels are classes [B].
        version: `standard`, `plus` or `rand`.
        batch_size: images at once.
        seed: of the package's random numbers. Results depend on the batch, as they do in the package.

    Returns:
        [B, C, H, W] in the images' dtype.

    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: as `fgsm`.
    """
    check_attack(images, eps, norm)
    check_choice("version", version, ("standard", "plus", "rand"))
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
        if victim.labels.ndim != 1:
            raise ValueError(f"labels must be classes [B]; got shape {list(labels.shape)}")
        if eps == 0:
            return images.clone()
        attack = AutoAttack(
            _Logits(model).eval(), device=str(images.device), eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm],
            seed=seed, version=version,
        )  # fmt: skip
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)  # 9 of its own accord, and fails below
        found, _ = attack.run_standard_evaluation(victim.clean, victim.labels, batch_size=batch_size)
        return victim.finish(found.to(images.device))
