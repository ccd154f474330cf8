"""Lightning with nullspace noise, for `import lightning.pytorch`.

It works with any LightningModule:

    noise = NullspaceCallback(lambda module: NullspaceAugment(module.vit, mode="boundary"))
    Trainer(callbacks=[noise]).fit(module, loader)
"""

from __future__ import annotations

from fastnull.compat import import_timm
from fastnull.integrations.lightning_hooks import LightningHooks

import_timm()  # Lightning imports torchvision
from lightning.pytorch import Callback  # noqa: E402


class NullspaceCallback(LightningHooks, Callback):
    __doc__ = LightningHooks.__doc__
