"""The command line: `fastnull COMMAND ...`, on argparse, with options made from the dataclasses (`options.py`).

Why no library makes it from the dataclasses: with tyro `--attack-eps 8/255` is an error ("could not convert string to
float") and the help shows 0.03137254901960784 in place of 8/255; a nested optional field becomes a subcommand
(`noise:synthesis-config`) whose values replace the recommended recipe; an option that is not given cannot be told from
its default, which presets, YAML files and defaults that depend on other fields (augment, site, model) need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.cli.parser import main
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.cli.parser")

__all__ = ["main"]
