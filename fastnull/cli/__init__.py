"""The command line: `fastnull COMMAND ...`, on argparse, with options made from the dataclasses (`options.py`).

Options of a command are absent unless they are given, so that defaults can depend on other fields (a mode's, a preset's),
fractions such as 8/255 are numbers, and an error is one line with the nearest name. The files stay short; a library that
makes a parser from dataclasses was not taken over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.cli.parser import main
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.cli.parser")

__all__ = ["main"]
