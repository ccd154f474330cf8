"""The rows of a benchmark's result: one measured variant each, in CSV and JSON files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastnull.record import replacing


@dataclass(frozen=True)
class Row:
    """One measured variant; the columns of rows.csv.

    Attributes:
        date, commit, device, torch, triton, threads: where and when.
        suite, op, backend, mode, dtype, shape: what; together the key by which `compare` matches rows.
        ms_p50, ms_p20, ms_p80: milliseconds of one call; None where nothing was timed (memory, skipped, wrong).
        gflop, mb: what the task needs, in 10⁹ operations and 10⁶ bytes (suite memory: the measured peak in mb).
        floor_ms: the larger of gflop and mb over the ceilings measured in the same run.
        floor_fraction: floor_ms / ms_p50.
        max_err: largest error against the reference, over the reference's largest magnitude.
        note: why a row has no time, or what is special about it.
    """

    date: str
    commit: str | None
    device: str
    torch: str
    triton: str | None
    threads: int
    suite: str
    op: str
    backend: str
    mode: str
    dtype: str
    shape: str
    ms_p50: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    gflop: float | None = None
    mb: float | None = None
    floor_ms: float | None = None
    floor_fraction: float | None = None
    max_err: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What was measured, apart from where and when."""
        return (self.suite, self.op, self.backend, self.mode, self.dtype, self.shape)


COLUMNS = tuple(field.name for field in fields(Row))

_NUMBERS = ("ms_p50", "ms_p20", "ms_p80", "gflop", "mb", "floor_ms", "floor_fraction", "max_err")


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, whole or not at all; with a header where the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if old and tuple(next(csv.reader(io.StringIO(old)))) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes; move it away")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not old:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    with replacing(path) as beside:
        beside.write_text(old + text.getvalue(), encoding="utf-8")


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run (.json), or of a rows.csv, where of rows with one key the last counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result of `fastnull bench`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no result {path}")
    try:
        if path.suffix == ".json":
            found = [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        else:
            with path.open(encoding="utf-8", newline="") as file:
                found = [Row(**_parsed(entry)) for entry in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of fastnull bench: {error}") from error
    return list({row.key: row for row in found}.values())


def _parsed(entry: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {name: None if text == "" else text for name, text in entry.items()}
    for name in _NUMBERS:
        values[name] = None if values[name] is None else float(values[name])
    return {**values, "threads": int(values["threads"]), "note": values["note"] or ""}
