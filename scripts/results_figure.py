"""Draws docs/figures/results.png: clean, attacked and corrupted accuracy of five ways of finetuning.

python scripts/results_figure.py        from benchmarks/results/robustness-*/comparison.json
"""

from __future__ import annotations

import json
from pathlib import Path

from fastnull.report.plots import canvas, draw_bars, legend_below

ROOT = Path(__file__).resolve().parent.parent

MEASURES = {"clean": "clean", "adversarial_mean": "under attack", "corruption_mean": "corrupted"}
METHODS = {
    "clean-only": ("clean images only", "#c9ccd1"),
    "universal": ("universal noise (published mode)", "#9aa0a8"),
    "random-one-view": ("random token noise, half of the images", "#6b727b"),
    "adversarial": ("adversarial training, 8/255", "#e08a2e"),
    "boundary-pixels": ("boundary noise in pixels (default)", "#1f6fb5"),
}
"""What the comparisons call a method: its name in the legend, and its colour. Controls are grey."""


def draw() -> bytes:
    """The figure as a PNG: a panel for each data set, a group of bars for each measure."""
    with canvas("results", 1, 2, width=10, height=4.2) as (axes, done):
        for axis, data in zip(axes, ("digits", "photos"), strict=True):
            path = ROOT / "benchmarks" / "results" / f"robustness-{data}" / "comparison.json"
            found = json.loads(path.read_text(encoding="utf-8"))["methods"]
            values = {
                label: [(found[method]["mean"][name], found[method]["std"][name]) for name in MEASURES]
                for method, (label, _) in METHODS.items()
            }
            draw_bars(axis, list(MEASURES.values()), values, [colour for _, colour in METHODS.values()])
            axis.set_title(data)
        axes[0].set_ylabel("accuracy [%]")
        legend_below(axes[0])
        return done("", "").png


if __name__ == "__main__":
    (ROOT / "docs" / "figures" / "results.png").write_bytes(draw())
