"""What a part of scripts/gpu_check.sh found, in a few lines: printed, and added to OUT/table.txt.

    python3 scripts/gpu_table.py PART STATUS SECONDS LOG OUT

Reads the JSON files in OUT where the part wrote any, else its log. Imports no torch, so that it takes no time.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ALL, ONE = 11_000, 4000
"""Characters of all tables and of one."""
WIDTH, LAST = 170, 8
"""Characters of a line, and lines of a failed part's log."""
WANTED = {"vit_base_patch16_224": 34.0, "vit_small_patch16_224": 13.0, "vit_base_patch32_224": 8.5}
"""Milliseconds of a step on an H100 that the project wants."""


def table(part: str, status: int, seconds: int, log: str, out: Path) -> str:
    """The part's result, its numbers, and the end of its log where it failed."""
    result = {0: "ok", 124: "out of time", 137: "out of time"}.get(status, f"FAILED ({status})")
    words = log.splitlines()
    lines = {"selftest": _selftest, "tests": _tests}.get(part, _rows)(part, words, out)
    if not lines or status not in (0, 124, 137):
        lines += words[-LAST - 8 * (status == 0) :]
    return "\n".join([f"{part}: {result}, {seconds} s", *(f"  {line[:WIDTH]}" for line in lines)])


def _selftest(part: str, words: list[str], out: Path) -> list[str]:
    """A line for each problem, the fastest implementation first; the wrong ones of this package with their reasons."""
    lines, seen = [line for line in words if line.startswith("first use")], set()
    for path in sorted(out.glob("selftest-*.json")):
        for problem, found in json.loads(path.read_text())["results"].items():
            if problem in seen:
                continue
            seen.add(problem)
            right = sorted((each["ms"], name) for name, each in found.items() if each["ms"] is not None)
            floor = f" {100 * found[right[0][1]]['floor']:.0f} %" if right else ""
            wrong = [
                f"{name}: {each['problem'][:60]}" for name, each in found.items()
                if each["problem"] and not each["problem"].startswith("does not take")
            ]  # fmt: skip
            times = ", ".join(f"{name} {ms:.3g}{floor if not place else ''}" for place, (ms, name) in enumerate(right))
            lines.append("; ".join([f"{problem.replace(' bfloat16', '')}: {times}", *wrong]))
    return lines


def _rows(part: str, words: list[str], out: Path) -> list[str]:
    """The rows of a benchmark; empty where the part wrote none."""
    path = out / f"{part}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()).get("rows", []) if path.is_file() else []
    lines = []
    for model in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == model]
        ours = [row["ms_p50"] for row in mine if row["ms_p50"] and row["backend"] in ("fastnull", "fastnull, graph")]
        best = min(ours, default=None)
        lines.append(f"{model}, wanted {WANTED.get(model, '-')} ms: ms, of floor, x ours, note")
        for row in mine:
            ms, part_of_floor = row["ms_p50"], row["floor_fraction"]
            numbers = f"{ms:8.2f} {100 * (part_of_floor or 0):3.0f} % {ms / best if best else 0:6.2f}" if ms else "-"
            lines.append(f"  {row['backend']} {row['dtype']}".ljust(34) + f"{numbers} {row['note'][:60]}".rstrip())
    return lines


def _tests(part: str, words: list[str], out: Path) -> list[str]:
    """Counts, and the tests that failed, as far as the log goes."""
    results = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b(?! .* - )", "\n".join(w for w in words if "::" in w))
    bad = [line for line in words if line.startswith(("FAILED ", "ERROR "))]
    bad = bad or [line for line in words if re.search(r"::.*(FAILED|ERROR)|(FAILED|ERROR) .*::", line)]
    lost = [line for line in words if line.startswith("lost device")]
    counts = ", ".join(f"{count} {name}" for name, count in Counter(results).items())
    return [counts or "none ran", *bad[:12], *lost[:4]]


if __name__ == "__main__":
    part, status, seconds, log, out = sys.argv[1:]
    kept = Path(out) / "table.txt"
    text = table(part, int(status), int(seconds), Path(log).read_text(errors="replace"), Path(out))[:ONE]
    text = text[: max(0, ALL - kept.stat().st_size)] + "\n"
    with kept.open("a", encoding="utf-8") as file:
        file.write(text)
    print(text, end="")
