"""Pictures of benchmark results: a panel of bars for every case, with the spread of the rounds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastnull.bench.rows import Row
from fastnull.record import replacing
from fastnull.report.plots import import_pyplot

COLOURS = {"float32": "#8C8C8C", "bfloat16": "#0072B2", "float16": "#009E73"}


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw the measured rows, milliseconds or (suite memory) megabytes, and write the file, whole or not at all.

    Args:
        rows: of one result; cases stand below one another in their order.
        path: .png, .svg or .pdf.

    Raises:
        ValueError: no row has a measurement.
        ImportError: matplotlib is missing.
    """
    panels: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if _value(row) is not None:
            panels.setdefault((row.suite, row.op, row.mode, row.shape), []).append(row)
    if not panels:
        raise ValueError("rows must hold at least one measurement; none has a time or a peak")
    plt = import_pyplot()
    heights = [1 + len(measured) for measured in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.24 * sum(heights) + 0.5 * len(panels)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, ((suite, op, mode, shape), measured) in zip(axes[:, 0], panels.items(), strict=True):
        for place, row in enumerate(measured):
            value = _value(row) or 0.0
            spread = None if row.ms_p20 is None else [[value - row.ms_p20], [(row.ms_p80 or value) - value]]
            ax.barh(place, value, xerr=spread, color=COLOURS.get(row.dtype, "#CC79A7"), ecolor="#404040", capsize=2)
            end = max(value, row.ms_p80 or 0.0)
            ax.annotate(
                f"{value:.4g}", (end, place), va="center", fontsize=7, xytext=(4, 0), textcoords="offset points"
            )
        ax.set_yticks(range(len(measured)), [f"{row.backend}, {row.dtype}" for row in measured], fontsize=7)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_title(f"{suite}: {op}, {mode} ({shape})", fontsize=8, loc="left")
        ax.set_xlabel("MB" if suite == "memory" else "ms", fontsize=7)
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format=Path(path).suffix[1:], dpi=150)
    finally:
        plt.close(figure)


def _value(row: Row) -> float | None:
    return row.mb if row.suite == "memory" else row.ms_p50
