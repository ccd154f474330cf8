"""The self-test: checks kernels against their references on this machine and times them, in a child process.

The encoder calls `prove`; `fastnull selftest` prints the results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.selftest.run import prove, table
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.selftest.run")

__all__ = ["prove", "table"]
