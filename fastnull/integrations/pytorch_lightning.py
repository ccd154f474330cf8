"""As fastnull.integrations.lightning, for `import pytorch_lightning`."""

from __future__ import annotations

from fastnull.compat import import_timm
from fastnull.integrations.lightning_hooks import LightningHooks

import_timm()  # Lightning imports torchvision
from pytorch_lightning import Callback  # noqa: E402


class NullspaceCallback(LightningHooks, Callback):
    __doc__ = LightningHooks.__doc__
