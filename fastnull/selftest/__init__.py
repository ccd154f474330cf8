"""Kernels prove themselves on the machine they run on: checked against their references and timed, in a child process.

`prove` is what the encoder calls; `fastnull selftest` prints what it found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.selftest.run import prove, table
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.selftest.run")

__all__ = ["prove", "table"]
