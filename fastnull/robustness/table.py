"""What is made of the numbers of evaluate(): the summary and a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastnull.robustness.metrics import ALEXNET_ERRORS, mean, mean_corruption_accuracy, mean_corruption_error


def summarize(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The few numbers of a result: clean, adversarial_mean (fgsm and pgd), corruption_mean, mce; None without data."""
    attacks = {f"{suite}/{key}": value for suite in ("fgsm", "pgd") for key, value in results.get(suite, {}).items()}
    corruptions = results.get("corruptions", {})
    complete = all(len(corruptions.get(name, {})) == 5 for name in ALEXNET_ERRORS)
    return {
        "clean": results.get("clean"),
        "adversarial_mean": mean(attacks) if attacks else None,
        "corruption_mean": mean_corruption_accuracy(corruptions) if corruptions else None,
        "mce": mean_corruption_error(corruptions) if complete else None,
    }


def eps_name(eps: float, norm: str = "linf") -> str:
    """8/255 → "8/255"; a radius of the l2 ball, or one that is no simple multiple of 1/255, as a decimal number."""
    steps = eps * 255
    if norm == "linf" and math.isclose(steps, round(steps, 2), abs_tol=1e-9):
        return f"{round(steps, 2):g}/255"
    return str(float(eps))


def format_table(results: Mapping[str, Any]) -> str:
    """A Markdown table of one result of `evaluate`, or of several, {name: result}, side by side; accuracies in %."""
    columns = {"accuracy": results} if "results" in results else dict(results)
    if not columns:
        raise ValueError("results must hold at least one result of evaluate(); got none")
    rows: dict[str, dict[str, float | None]] = {}
    for column, record in columns.items():
        for label, value in _flat(record).items():
            rows.setdefault(label, {})[column] = value
    # the summary goes last, whatever rows a later result added
    labels = sorted(rows, key=lambda label: label.startswith("**"))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for label in labels:
        cells = [rows[label].get(column) for column in columns]
        lines.append(f"| {label} | " + " | ".join("–" if cell is None else f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _flat(record: Mapping[str, Any]) -> dict[str, float | None]:
    results, summary = record["results"], record["summary"]
    rows: dict[str, float | None] = {}
    if "clean" in results:
        rows["clean"] = results["clean"]
    for suite in ("fgsm", "pgd", "apgd"):
        for key, value in results.get(suite, {}).items():
            rows[f"{suite.upper()} {key}"] = value
    for name, table in results.get("corruptions", {}).items():
        rows[f"{name} (mean of severities {', '.join(table)})"] = mean(table)
    names = {"adversarial_mean": "adversarial mean", "corruption_mean": "corruption mean", "mce": "mCE"}
    rows.update({f"**{names[key]}**": summary[key] for key in names if summary.get(key) is not None})
    return rows
