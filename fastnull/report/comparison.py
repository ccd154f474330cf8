"""Numbers of a comparison: mean and standard deviation per method, and paired differences between methods."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastnull.report.claims import MEASURES, compare, signed
from fastnull.report.runs import Run

COLUMNS = ("clean", "adversarial_mean", "corruption_mean")
_SPENT = ("seconds", "synthesis_percent", "steps", "forward_passes")
"""Costs of a run; seconds and steps are of the finetuning."""
_CORRUPTION = "corruption/"
"""Prefix of a corruption's mean accuracy over severities."""


def summarize_runs(runs: Sequence[Run], methods: Sequence[str]) -> dict[str, Any]:
    """Summarise runs by method.

    Args:
        runs: one per method and seed.
        methods: labels of the runs, in the order of the tables.

    Returns:
        `methods`: label → {`seeds`: {seed: values}, `mean`, `std` (None for a single seed)}, with the values clean,
        adversarial_mean, corruption_mean, mce, corruption/NAME (mean over severities; all in %), seconds,
        synthesis_percent, steps, forward_passes and `limit` of the noise. `differences`: for each measure and pair of
        methods {method, other, measure, per_seed, mean, standard_error, low, high} in percentage points, with
        Student's 95 % interval (None with fewer than three seeds).
    """
    values = {
        method: {
            run.seed: {
                **{name: run.record["summary"].get(name) for name in (*MEASURES, "mce")},
                **_by_corruption(run.record),
                **{name: run.spent.get(name) for name in _SPENT},
                "limit": (run.settings.get("synthesis") or {}).get("limit"),
            }
            for run in runs
            if run.method == method
        }
        for method in methods
    }
    differences = []
    for measure, (method, other) in itertools.product(MEASURES, itertools.permutations(methods, 2)):
        found = compare(values, method, other, measure)
        if found is not None:
            margin = found.margin
            differences.append({
                "method": method,
                "other": other,
                "measure": measure,
                "per_seed": list(found.differences),
                "mean": found.mean,
                "standard_error": found.standard_error,
                "low": None if margin is None else found.mean - margin,
                "high": None if margin is None else found.mean + margin,
            })  # fmt: skip
    return {"methods": {method: _moments(values[method]) for method in methods}, "differences": differences}


def _by_corruption(record: Mapping[str, Any]) -> dict[str, float]:
    found = record.get("results", {}).get("corruptions") or {}
    return {_CORRUPTION + name: statistics.fmean(severities.values()) for name, severities in found.items()}


def _moments(by_seed: Mapping[int, Mapping[str, float | None]]) -> dict[str, Any]:
    names = list(next(iter(by_seed.values())))
    known = {name: [v for row in by_seed.values() if (v := row[name]) is not None] for name in names}
    return {
        "seeds": {str(seed): dict(row) for seed, row in by_seed.items()},
        "mean": {name: statistics.fmean(found) if found else None for name, found in known.items()},
        "std": {name: statistics.stdev(found) if len(found) > 1 else None for name, found in known.items()},
    }


def format_comparison(record: Mapping[str, Any]) -> str:
    """Markdown tables of `summarize_runs`: the methods, every method against the first one, and each corruption."""
    methods = record["methods"]
    lines = [
        "| finetuned with | clean [%] | under attack [%] | corrupted [%] | steps | time [s] | of which synthesis |",
        "|---|" + "---:|" * 6,
    ]
    for method, found in methods.items():
        cells = [_cell(found, name) for name in COLUMNS]
        cells += [_cell(found, "steps", 0, False), _cell(found, "seconds", 0)]
        cells.append(_cell(found, "synthesis_percent", 0, False) + " %")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    seeds = len(next(iter(methods.values()))["seeds"])
    lines += [
        "",
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, at equal training compute.",
        "",
    ]
    first = next(iter(methods))
    lines += [f"| minus {first} [points] | clean | under attack | corrupted |", "|---|" + "---:|" * 3]
    table = {(row["method"], row["measure"]): row for row in record["differences"] if row["other"] == first}
    for method in methods:
        if method != first:
            cells = [_difference(table.get((method, name))) for name in COLUMNS]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "Mean of the differences paired by seed, and its 95 % confidence interval (Student's t)."]
    corruptions = [name for name in next(iter(methods.values()))["mean"] if name.startswith(_CORRUPTION)]
    if corruptions:
        titles = [name.removeprefix(_CORRUPTION).replace("_", " ") for name in corruptions]
        lines += ["", f"| corrupted [%] | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
        for method, found in methods.items():
            lines.append(f"| {method} | {' | '.join(_cell(found, name) for name in corruptions)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any], name: str, digits: int = 1, deviation: bool = True) -> str:
    mean, std = found["mean"][name], found["std"][name]
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if deviation and std is not None else "")


def _difference(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    interval = "" if row["low"] is None else f" ({signed(row['low'])} to {signed(row['high'])})"
    return signed(row["mean"]) + interval
