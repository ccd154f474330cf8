"""Public names of packages that load their module on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, *modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose `__all__` names are defined in these modules.

    Modules are imported in order until one has the name, so put the light ones first.
    """

    def load(name: str) -> Any:
        if name in importlib.import_module(package).__all__:
            for module in map(importlib.import_module, modules):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load, lambda: sorted(importlib.import_module(package).__all__)
