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
    """Import timm (with its optim, scheduler, data and utils), also where torchvision does not match torch.

    torchvision's Python code registers fake kernels for its compiled operators `nms` and `qnms` while it is imported.
    Beside another build of torch (a CPU torch with the registry's torchvision, say) the compiled library does not
    load, the operators do not exist and the import fails. Nothing in timm's classification models calls them, so their
    schemas alone, declared here, let the import go through; a call of one still fails with torch's own error.

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
    _LIBRARIES.append(library)  # a library that is collected takes its operators with it
    # the failed import left half-initialised modules behind
    for name in [key for key in sys.modules if key == "torchvision" or key.startswith("torchvision.")]:
        del sys.modules[name]
