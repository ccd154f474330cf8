"""Where launchers take their tiles from: the table in the kernel's file, or what `fastnull bench --tune` measured.

FASTNULL_TILES names a JSON file that the tuner wrote: {"device": name of the GPU, "tables": {"attention.FORWARD":
[{"head": 64, ...}, ...], ...}}. It is read when the kernels are imported; a table it names replaces the one in the
file, on the GPU it was measured on. Nothing is ever tuned at run time.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch

Tile = TypeVar("Tile")


def table(name: str, default: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """The table of this name, `<file>.<TABLE>`: the measured one where FASTNULL_TILES has it, else `default`.

    Raises:
        ValueError: FASTNULL_TILES is no file of the tuner; the message says what is wrong.
    """
    entries = _measured().get(name)
    if entries is None:
        return default
    try:
        tiles = tuple(type(default[0])(**entry) for entry in entries)
    except TypeError as error:
        raise ValueError(f"FASTNULL_TILES: table {name} does not fit {type(default[0]).__name__}: {error}") from None
    if not tiles:
        raise ValueError(f"FASTNULL_TILES: table {name} is empty")
    return tiles


@functools.cache
def _measured() -> dict[str, list[dict[str, Any]]]:
    path = os.environ.get("FASTNULL_TILES")
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        device, tables = found["device"], dict(found["tables"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"FASTNULL_TILES={path} is no file of `fastnull bench --tune`: {error!r}") from None
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    if device != here:
        warnings.warn(f"FASTNULL_TILES was measured on {device}, not on {here}: it is not used", stacklevel=2)
        return {}
    return tables
