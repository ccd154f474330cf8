"""Damaged JSON values and safetensors headers, for tests of readers of files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

WRONG: tuple[Any, ...] = (None, -1, 0.5, "x", "", True, [], [1], {}, {"a": 1})


def damaged(value: Any) -> Iterator[tuple[str, Any]]:
    """(what is wrong, the damaged value): each entry of a nested value replaced by each of WRONG, or removed."""
    for path in _paths(value):
        for wrong in WRONG:
            changed = copy.deepcopy(value)
            _inside(changed, path)[path[-1]] = wrong
            yield f"{path} is {wrong!r}", changed
        changed = copy.deepcopy(value)
        del _inside(changed, path)[path[-1]]
        yield f"{path} is gone", changed


def header_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def _paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        keys: Any = list(value)
    else:
        keys = range(min(2, len(value))) if isinstance(value, list) else ()
    for key in keys:
        yield (*above, key)
        yield from _paths(value[key], (*above, key))


def _inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value
