"""The command line: `fastnull COMMAND ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.cli.parser import main
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.cli.parser")

__all__ = ["main"]
