"""Tile sizes. Each kernel file has a table of them, and CANDIDATES: changes that `fastnull selftest --tiles` tries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

Tile = TypeVar("Tile")
Change = Mapping[str, int]

_launch = threading.local()


def changed(tile: Tile) -> Tile:
    """A tile of the table with the changes of the current launch."""
    change: Change = getattr(_launch, "change", {})
    return replace(tile, **change) if change else tile  # type: ignore[type-var]


def with_change(launcher: Callable[..., None], change: Change) -> Callable[..., None]:
    """Return a launcher that applies a change to the tiles of all its kernels."""

    def launch(*args: Any) -> None:
        _launch.change = change
        try:
            launcher(*args)
        finally:
            _launch.change = {}

    return launch


def change_name(change: Change) -> str:
    """Name of a change in the results: "queries=64,keys=128,warps=8"."""
    return ",".join(f"{field}={value}" for field, value in change.items())
