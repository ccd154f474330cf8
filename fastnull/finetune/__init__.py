"""Finetuning: one loop for every augmentation, which can stop at any step and resume bitwise.

    from fastnull.finetune import FinetuneConfig, finetune
    result = finetune(FinetuneConfig(model="vit_small_patch16_224", pretrained=True, data="images", out="runs/first"))

Random numbers have no state, so a run resumes exactly: the order of the images depends only on (seed, epoch), the
augmentation of an image on (seed, epoch, index), and Mixup, drop path and noise on (seed, step). This holds on the CPU;
on a GPU some of torch's kernels are not deterministic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.finetune.config import FinetuneConfig
    from fastnull.finetune.loop import finetune
    from fastnull.finetune.plan import Plan, make_plan
    from fastnull.finetune.training import DivergenceError, FinetuneResult
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        "fastnull.finetune.config",
        "fastnull.finetune.plan",
        "fastnull.finetune.training",
        "fastnull.finetune.loop",
    )

__all__ = ["DivergenceError", "FinetuneConfig", "FinetuneResult", "Plan", "finetune", "make_plan"]
