"""Training in several processes, and models whose weights are sharded over them (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.distributed.processes import PeerError, Processes, explained, join, leave, without_exchange
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.distributed.processes")

__all__ = ["PeerError", "Processes", "explained", "join", "leave", "without_exchange"]
