"""The command line: `fastnull COMMAND ...`, on argparse, with options made from the dataclasses (`options.py`).

tyro and jsonargparse were tried instead. In both, `--attack-eps 8/255` is an error. tyro makes a subcommand of a nested
optional field (`noise:synthesis-config`). jsonargparse wants `--noise.step_size`, `--pretrained true`, `--eps [1,2,4]`
and `null`, takes `--amp none` for the text "none", drops the first of two equal fields of a YAML file in silence, and
finds no option at all in a class with a `__new__`. To adapt it would take about as many lines as our own options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.cli.parser import main
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.cli.parser")

__all__ = ["main"]
