"""Imports that need help on some machines."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

_LIBRARIES: list[torch.library.Library] = []


@functools.cache
def import_timm() -> ModuleType:
    """Import timm (with its optim, scheduler, data and utils), even if torchvision does not match torch.

    On import torchvision registers fake kernels for its compiled operators `nms` and `qnms`. With another build of
    torch the compiled library does not load, the operators do not exist and the import fails. timm's classification
    models do not call them, so declaring their schemas is enough; calling one still raises torch's error.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_torchvision_operators()
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"this needs timm (pip install timm): {error}") from error
    for name in ("optim", "scheduler", "data", "utils"):
        importlib.import_module(f"timm.{name}")
    return timm


def _declare_torchvision_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # its operators exist as long as the library object
    # remove what the failed import initialised
    for name in [key for key in sys.modules if key == "torchvision" or key.startswith("torchvision.")]:
        del sys.modules[name]
