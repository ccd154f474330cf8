"""Attacks on [0, 1] pixels. Each: (model, images, labels, …) → adversarial images, shaped and typed as the images.

Weights get no gradient; module modes, requires_grad flags and the global random state are restored after a call.
Without a `generator` the random starts depend only on (seed, index of the image).
"""

from fastnull.robustness.attacks.adaptive import apgd
from fastnull.robustness.attacks.auto import autoattack
from fastnull.robustness.attacks.carlini import cw_l2
from fastnull.robustness.attacks.gradient import fgsm, mi_fgsm, pgd
from fastnull.robustness.attacks.patch import patch_attack

__all__ = ["apgd", "autoattack", "cw_l2", "fgsm", "mi_fgsm", "patch_attack", "pgd"]
