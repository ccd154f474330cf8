"""The command line: `fastnull COMMAND ...`, on argparse, with options made from the dataclasses (`options.py`).

tyro was tried in its place: there `--attack-eps 8/255` is an error ("could not convert string to float"), and a nested
optional field becomes a subcommand (`noise:synthesis-config`), where presets, YAML files and recommended settings of
augmentation and site need single options that know whether they were given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.cli.parser import main
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.cli.parser")

__all__ = ["main"]
