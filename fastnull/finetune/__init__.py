"""Finetuning: one loop for every augmentation, read from the top down; it stops at any step and resumes bitwise.

    from fastnull.finetune import FinetuneConfig, finetune
    result = finetune(FinetuneConfig(model="vit_small_patch16_224", pretrained=True, data="images", out="runs/first"))

Exact resume rests on one rule: nothing random has a state. The order of the images is a function of (seed, epoch), an
image's augmentation of (seed, epoch, index), and Mixup, drop path and noise of (seed, step). (That holds on the CPU; on
a GPU some of torch's own kernels add in an order that varies.)
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
