"""Numbers of a comparison: mean and standard deviation per method, and paired differences between methods."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastnull.data.classes import shortened
from fastnull.report.claims import MEASURES, SEEDS_NEEDED, compare, signed
from fastnull.report.runs import Run
from fastnull.robustness.metrics import ALEXNET_ERRORS
from fastnull.robustness.settings import ATTACKS
from fastnull.robustness.suites import FOLDER_SUITES

COLUMNS = ("clean", "adversarial_mean", "corruption_mean")
_SPENT = ("seconds", "synthesis_percent", "steps", "forward_passes")
"""Costs of a run; seconds and steps are of the finetuning."""
_SUITE, _CORRUPTION = "suite/", "corruption/"
"""Prefix of the mean accuracy of a suite over radii, and of a corruption over severities."""
_IN_COLUMNS = ("clean", "corruptions")
"""Suites that need no table of their own."""


def summarize_runs(runs: Sequence[Run], methods: Sequence[str]) -> dict[str, Any]:
    """Summarise runs by method.

    Args:
        runs: one per method and seed.
        methods: labels of the runs, in the order of the tables.

    Returns:
        `methods`: label → {`seeds`: {seed: values}, `mean`, `std` (None for a single seed)}, with the values clean,
        adversarial_mean, corruption_mean, mce, suite/NAME and corruption/NAME (means over radii and severities; all in
        %), seconds, synthesis_percent, steps, forward_passes and `limit` of the noise. `differences`: for each measure
        and pair of methods {method, other, measure, per_seed, mean, standard_error, low, high} in percentage points,
        with Student's 95 % interval (None with fewer than three seeds).
    """
    values = {
        method: {
            run.seed: {
                **{name: run.record["summary"].get(name) for name in (*MEASURES, "mce")},
                **_means(_SUITE, run.record["results"], _IN_COLUMNS),
                **_means(_CORRUPTION, run.record["results"].get("corruptions") or {}),
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


def _means(prefix: str, results: Mapping[str, Any], skip: Sequence[str] = ()) -> dict[str, float]:
    """Name → mean of the numbers below it."""
    found = {name: value for name, value in results.items() if name not in skip and name != "clean_top5"}
    return {prefix + name: statistics.fmean(_numbers(value)) for name, value in found.items()}


def _numbers(value: Any) -> list[float]:
    return [number for each in value.values() for number in _numbers(each)] if isinstance(value, Mapping) else [value]


def _moments(by_seed: Mapping[int, Mapping[str, float | None]]) -> dict[str, Any]:
    names = list(next(iter(by_seed.values())))
    known = {name: [v for row in by_seed.values() if (v := row[name]) is not None] for name in names}
    return {
        "seeds": {str(seed): dict(row) for seed, row in by_seed.items()},
        "mean": {name: statistics.fmean(found) if found else None for name, found in known.items()},
        "std": {name: statistics.stdev(found) if len(found) > 1 else None for name, found in known.items()},
    }


def format_comparison(record: Mapping[str, Any]) -> str:
    """Markdown of comparison.json: the methods, every method against the first one, each suite and corruption, and what
    `describe` says."""
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
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, {_compute(methods)}.",
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
    for prefix, title in ((_SUITE, "accuracy [%]"), (_CORRUPTION, "corrupted [%]")):
        names = [name for name in next(iter(methods.values()))["mean"] if name.startswith(prefix)]
        if names:
            titles = [name.removeprefix(prefix).replace("_", " ") for name in names]
            lines += ["", f"| {title} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
            for method, found in methods.items():
                lines.append(f"| {method} | {' | '.join(_cell(found, name) for name in names)} |")
    for text in describe(record):
        lines += ["", text]
    return "\n".join(lines) + "\n"


def _compute(methods: Mapping[str, Any]) -> str:
    """Whether the methods spent the same compute. The refresh of universal noise may stop early."""
    spent = {name: found["mean"]["forward_passes"] for name, found in methods.items()}
    steps = [found["mean"]["steps"] for found in methods.values()]
    if None in spent.values() or not all(steps):
        return "at most the same training compute"
    step = max(passes / count for passes, count in zip(spent.values(), steps, strict=True))
    if max(spent.values()) - min(spent.values()) <= step:
        return "at equal training compute"
    each = ", ".join(f"{name} {passes:.3g}" for name, passes in spent.items())
    return f"at most the same training compute (forward passes for each training image: {each})"


def describe(record: Mapping[str, Any]) -> list[str]:
    """Paragraphs on what comparison.json is about: model, data, start, and what was not measured; none for a file of
    version 0.1."""
    about = record.get("about")
    if not about:
        return []
    settings = record["settings"]
    height, width = about["pixels"]
    weights = {"random": "random weights", "pretrained": "timm's pretrained weights", None: "its own weights"}
    source = weights.get(about["weights"]) or f"weights from `{Path(about['weights']).name}`"
    model = f"`{about['model']}` ({about['parameters']:,} parameters, {height}x{width} pixels), {source}"
    classes = f" in {len(about['classes'])} classes ({shortened(about['classes'])})" if about["classes"] else ""
    measured = "test" if settings["split"] == "test" else "held-out training"
    epochs, starts = about["start_epochs"], list(about["start_accuracy"].values())
    accuracy = f"{statistics.fmean(starts):.1f}" + (f" ± {statistics.stdev(starts):.1f}" if len(starts) > 1 else "")
    begin = "the weights as they are"
    if epochs:
        begin = f"{epochs} epoch{'' if epochs == 1 else 's'} of training on clean images"
    return [
        f"Model: {model}{', with a new head' if about['new_head'] else ''}. Data: `{Path(about['data']).name}`, "
        f"{about['train']:,} training and {about['test']:,} {measured} images{classes}.",
        f"Start: {begin}; accuracy {accuracy} % on clean images. From there each method has "
        f"{settings['budget']:g} forward passes for each training image.",
        f"Not covered: {'; '.join(_not_covered(settings, about))}.",
    ]


def _not_covered(settings: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """What the evaluation of a comparison left out."""
    suites = settings["suites"]
    found = ["other models, data and image sizes", "attacks in L2 other than `cw`", "attacks without gradients"]
    if "autoattack" in suites:
        found.pop()
    left = {"attacks": [name for name in ATTACKS if name not in suites]}
    folders = [name for name in FOLDER_SUITES if name not in suites]
    if len(folders) < len(FOLDER_SUITES):
        left["published test sets"] = folders
    else:
        found.append("all published test sets")
    if "corruptions" in suites:
        left["corruptions of ImageNet-C"] = [name for name in ALEXNET_ERRORS if name not in settings["corruptions"]]
        left["severities"] = [str(severity) for severity in range(1, 6) if severity not in settings["severities"]]
    else:
        found.append("corruptions in memory")
    found += [f"{what} {', '.join(names)}" for what, names in left.items() if names]
    for name, what in (("images", "attacks and corruptions"), ("costly_images", "the costly attacks")):
        count = settings[name]
        if count is not None and count < about["test"]:
            found.append(f"{what} on more than {count} of {about['test']} images")
    if settings["seeds"] < SEEDS_NEEDED:
        found.append(f"the spread over seeds ({settings['seeds']} of at least {SEEDS_NEEDED})")
    return found


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
