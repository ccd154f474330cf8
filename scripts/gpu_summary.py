"""The last words of scripts/gpu_check.sh: summary.json and table.txt of what its parts gave.

    python3 scripts/gpu_summary.py WORK OUT

WORK has `parts` (lines of part, exit status and seconds, tab-separated) and, of those made, build.json, noise.json and
profile.json, which go into the summary whole; OUT has the benchmarks' results steps.json, ops.json and cpp.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastnull.bench import Row, format_table, read_rows
from fastnull.record import provenance, write_json

# milliseconds of a step on an H200 that the project wants, and how many times the speed of frozen eager, frozen compile
# and the published loop
WANTED = {
    "vit_small_patch16_224": (9.5, 1.8, 1.3, 7.0),
    "vit_base_patch16_224": (30.0, 1.5, 1.2, 6.0),
    "vit_base_patch32_224": (7.0, 1.6, 1.25, 5.5),
    "vit_large_patch16_224": (105.0, 1.3, 1.15, 5.5),
}
AGAIN = "(again)"
BASELINES = (("frozen", "bfloat16"), ("compiled", "bfloat16"), ("published", "float32"))


def summarize(work: Path, out: Path) -> dict[str, Any]:
    """What each part gave: {"parts", "steps", "ops", "build", "noise", "profile"}, of what is there."""
    lines = [line.split("\t") for line in (work / "parts").read_text().splitlines()]
    found: dict[str, Any] = {"parts": [{"part": p, "status": int(s), "seconds": int(t)} for p, s, t in lines]}
    found["steps"] = [_step(name, rows) for name, rows in _by_op(out / "steps.json").items()]
    found["ops"] = [
        _op(f"{op}{label}", row, rows)
        for label, name in (("", "ops.json"), (", C++", "cpp.json"))
        for op, rows in _by_op(out / name).items()
        for row in rows
        if row.backend.startswith("fastnull") and not row.backend.endswith(AGAIN)
    ]
    for name in ("build", "noise", "profile"):
        path = work / f"{name}.json"
        found[name] = json.loads(path.read_text()) if path.is_file() and path.stat().st_size else None
    return found


def _op(name: str, mine: Row, rows: list[Row]) -> dict[str, Any]:
    """A row of ours, and the fastest of the others in its dtype."""
    others = [row for row in rows if row.dtype == mine.dtype and row.ms_p50 and not row.backend.startswith("fastnull")]
    best = min(others, key=lambda row: row.ms_p50 or 0.0, default=None)
    both = best is not None and mine.ms_p50
    return {
        "op": f"{name}{mine.backend.removeprefix('fastnull')}", "dtype": mine.dtype, "ms": mine.ms_p50,
        "floor_fraction": mine.floor_fraction, "best other": None if best is None else best.backend,
        "x best other": best.ms_p50 / mine.ms_p50 if both else None, "note": mine.note,  # type: ignore[union-attr, operator]
    }  # fmt: skip


def _by_op(path: Path) -> dict[str, list[Row]]:
    """op → rows of a result; empty where the part wrote none."""
    grouped: dict[str, list[Row]] = {}
    if path.is_file() and path.stat().st_size:
        for row in read_rows(path):
            grouped.setdefault(f"{row.op} {row.shape}" if row.suite == "projection" else row.op, []).append(row)
    return grouped


def _step(name: str, rows: list[Row]) -> dict[str, Any]:
    times = {(row.backend, row.dtype): row for row in rows}
    ours = [times[key] for key in (("fastnull, graph", "bfloat16"), ("fastnull", "bfloat16")) if key in times]
    mine = next((row for row in ours if row.ms_p50), ours[-1] if ours else None)
    step: dict[str, Any] = {"model": name, "ms": None, "floor_fraction": None, "note": "not measured"}
    if mine is not None:
        step |= {"ms": mine.ms_p50, "floor_fraction": mine.floor_fraction, "note": mine.note}
    for key in BASELINES:
        base = times.get(key)
        both = mine is not None and mine.ms_p50 and base is not None and base.ms_p50
        step[f"x {key[0]}"] = base.ms_p50 / mine.ms_p50 if both else None  # type: ignore[union-attr, operator]
    notes = {"": step["note"], "frozen: ": "", "compiled: ": ""}
    for name in ("frozen", "compiled"):
        row = times.get((name, "bfloat16"))
        notes[f"{name}: "] = row.note if row is not None else ""
    step["note"] = "; ".join(label + note for label, note in notes.items() if note)
    return step


def table(found: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [("part", "result", "seconds")]
    for part in found["parts"]:
        result = {0: "ok", 124: "out of time", 137: "out of time"}.get(part["status"], f"FAILED ({part['status']})")
        lines.append((part["part"], result, str(part["seconds"])))
    blocks = [format_table(lines)]
    if found["steps"]:
        rows = [
            ("step, bfloat16", "ms", "wanted", "of floor", *(f"x {name} {kind}" for name, kind in BASELINES), "note")
        ]
        for step in found["steps"]:
            wanted = WANTED.get(step["model"])
            ratios = [
                f"{_text(step[f'x {name}'])}{f' ({wanted[1 + index]:g})' if wanted else ''}"
                for index, (name, _) in enumerate(BASELINES)
            ]
            ms, fraction = _text(step["ms"]), _text(step["floor_fraction"], 100, " %")
            rows.append((step["model"], ms, f"{wanted[0]:g}" if wanted else "-", fraction, *ratios, step["note"]))
        blocks.append(format_table(rows))
    if found["ops"]:
        rows = [("op", "dtype", "ms", "of floor", "x best other", "which", "note")]
        for op in found["ops"]:
            fraction, ratio = _text(op["floor_fraction"], 100, " %"), _text(op["x best other"])
            rows.append((op["op"], op["dtype"], _text(op["ms"]), fraction, ratio, op["best other"] or "-", op["note"]))
        blocks.append(format_table(rows))
    if found["noise"]:
        ends = ", ".join(f"{key} {100 * value:.2f} %" for key, value in found["noise"]["relative"].items())
        blocks.append(f"noise after bfloat16 steps, against float32: {ends} (wanted: 2 %)")
    return "\n\n".join(blocks)


def _text(value: float | None, factor: float = 1, unit: str = "") -> str:
    return "-" if value is None else f"{factor * value:.3g}{unit}"


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    summary = summarize(Path(sys.argv[1]), folder)
    write_json(folder / "summary.json", {**summary, "provenance": provenance()})
    text = table(summary)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
