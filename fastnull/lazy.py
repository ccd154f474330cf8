"""The faces of packages: public names that load their module on first use, so that a face imports nothing itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, *modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that has the names in its `__all__` from these modules.

    The modules are imported one after the other, and only until one has the name: the light ones come first.
    """

    def load(name: str) -> Any:
        if name in importlib.import_module(package).__all__:
            for module in map(importlib.import_module, modules):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load, lambda: sorted(importlib.import_module(package).__all__)
