"""The summary of a result of evaluate(), and Markdown tables of results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastnull.robustness.metrics import ALEXNET_ERRORS, mean, mean_corruption_accuracy, mean_corruption_error

PUBLISHED_COLUMNS = (
    "Clean", "PatchFool", "CW", "FGSM", "DamageNet", "A", "C (mCE)", "V2", "R", "Sketch", "Stylized", "Avg",
)  # fmt: skip
"""The table of arXiv 2403.10476: accuracies in %, of C the mCE, and their mean with C as 100 - mCE."""

PUBLISHED: dict[str, tuple[float, ...]] = {
    "ViT-S, published": (74.19, 0.68, 4.63, 13.79, 29.82, 16.35, 71.13, 62.51, 34.67, 14.26, 12.15, 26.54),
    "ViT-S + nullspace, published": (77.47, 19.10, 9.37, 25.95, 32.43, 20.77, 55.98, 66.5, 41.61, 25.67, 16.02, 34.45),
    "ViT-B, published": (77.68, 15.92, 12.54, 25.65, 38.69, 23.88, 62.16, 66.05, 41.63, 16.31, 17.97, 34.01),
    "ViT-B + nullspace, published": (
        81.42, 23.52, 14.23, 36.50, 40.44, 24.55, 47.82, 70.25, 44.85, 26.35, 19.02, 39.39,
    ),
    "ViT-B + DAT, published": (81.47, 22.64, 23.59, 48.80, 43.31, 23.83, 45.95, 70.24, 48.68, 36.94, 23.99, 43.41),
    "ViT-B + DAT + nullspace, published": (
        81.33, 24.14, 23.61, 48.98, 43.67, 24.22, 45.91, 70.14, 48.48, 37.25, 23.87, 43.61,
    ),
}  # fmt: skip


def summarize(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The summary of a result; None for what was not measured.

    clean; adversarial_mean (fgsm and pgd); corruption_mean and mce (15 corruptions at 5 severities) of corruptions in
    memory; imagenet_c_mean and imagenet_c_mce, and cifar10_c_mean, of the published files, if these were measured.
    """
    attacks = {f"{suite}/{key}": value for suite in ("fgsm", "pgd") for key, value in results.get(suite, {}).items()}
    summary: dict[str, float | None] = {
        "clean": results.get("clean"),
        "adversarial_mean": mean(attacks) if attacks else None,
    }
    for suite, mean_key, mce_key in (
        ("corruptions", "corruption_mean", "mce"), ("imagenet-c", "imagenet_c_mean", "imagenet_c_mce"),
    ):  # fmt: skip
        tables = results.get(suite, {})
        complete = all(len(tables.get(name, {})) == 5 for name in ALEXNET_ERRORS)
        if tables or suite == "corruptions":
            summary[mean_key] = mean_corruption_accuracy(tables) if tables else None
            summary[mce_key] = mean_corruption_error(tables) if complete else None
    if "cifar10-c" in results:
        summary["cifar10_c_mean"] = mean_corruption_accuracy(results["cifar10-c"])
    return summary


def published_row(record: Mapping[str, Any]) -> list[float | None]:
    """The numbers of a result in the order of PUBLISHED_COLUMNS; FGSM at its first radius, None if not measured.

    Clean is the suite clean, or else imagenet-val. The patch attack only resembles Patch-Fool, and the published
    settings of CW and FGSM are unknown: these columns are similar, not equal.
    """
    results, summary = record["results"], record["summary"]
    row = [
        results.get("clean", results.get("imagenet-val")),
        results.get("patch"),
        results.get("cw"),
        next(iter(results.get("fgsm", {}).values()), None),
        results.get("damagenet"),
        results.get("imagenet-a"),
        summary.get("imagenet_c_mce"),
        *(results.get(f"imagenet-{name}") for name in ("v2", "r", "sketch", "stylized")),
    ]
    gains = [100 - value if name == "C (mCE)" else value
             for name, value in zip(PUBLISHED_COLUMNS, row, strict=False) if value is not None]  # fmt: skip
    return [*row, mean(dict(enumerate(gains))) if len(gains) == len(row) else None]


def format_published(records: Mapping[str, Mapping[str, Any]], *, published: bool = True) -> str:
    """A Markdown table in the order of the published one: {name: result of evaluate()}, then the published rows."""
    rows: dict[str, Sequence[float | None]] = {name: published_row(record) for name, record in records.items()}
    if published:
        rows |= PUBLISHED
    lines = ["| | " + " | ".join(PUBLISHED_COLUMNS) + " |", "|---|" + "---:|" * len(PUBLISHED_COLUMNS)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join("–" if value is None else f"{value:.2f}" for value in row) + " |")
    return "\n".join(lines) + "\n"


def eps_name(eps: float, norm: str = "linf") -> str:
    """8/255 → "8/255"; l2 radii, and radii that are not simple multiples of 1/255, are decimal numbers."""
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
    # the summary is last
    labels = sorted(rows, key=lambda label: label.startswith("**"))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for label in labels:
        cells = [rows[label].get(column) for column in columns]
        lines.append(f"| {label} | " + " | ".join("–" if cell is None else f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_TITLES = {"mi_fgsm": "MI-FGSM", "apgd_t": "APGD-T", "autoattack": "AutoAttack"}


def _flat(record: Mapping[str, Any]) -> dict[str, float | None]:
    results, summary = record["results"], record["summary"]
    rows: dict[str, float | None] = {}
    if "clean" in results:
        rows["clean"] = results["clean"]
    for suite in ("fgsm", "pgd", "mi_fgsm", "apgd", "apgd_t", "autoattack"):
        for key, value in results.get(suite, {}).items():
            rows[f"{_TITLES.get(suite, suite.upper())} {key}"] = value
    rows |= {title: results[suite] for suite, title in (("cw", "CW L2"), ("patch", "one patch")) if suite in results}
    rows |= {f"with noise, {which}": value for which, value in results.get("noise", {}).items()}
    for suite, title in (("corruptions", "{}"), ("imagenet-c", "imagenet-c {}"), ("cifar10-c", "cifar10-c {}")):
        for name, table in results.get(suite, {}).items():
            rows[f"{title.format(name)} (mean of severities {', '.join(table)})"] = mean(table)
    folders = ("imagenet-val", "damagenet", *(f"imagenet-{name}" for name in ("a", "v2", "r", "sketch", "stylized")))
    rows |= {name: results[name] for name in folders if name in results}
    names = {
        "adversarial_mean": "adversarial mean",
        "corruption_mean": "corruption mean (in memory)",
        "mce": "mCE (in memory, not of the published files)",
        "imagenet_c_mean": "imagenet-c mean",
        "imagenet_c_mce": "imagenet-c mCE",
        "cifar10_c_mean": "cifar10-c mean",
    }
    rows.update({f"**{names[key]}**": summary[key] for key in names if summary.get(key) is not None})
    return rows
