"""Draws the figures of the committed comparisons, benchmarks/results/robustness-*/*.json.

docs/figures/results.png: clean, attacked and corrupted accuracy of five ways of finetuning small models.
docs/figures/cifar10.png: clean and corrupted accuracy over that under attack, of all ways of finetuning a DINOv2 ViT,
and accuracy over the radius of PGD.

python scripts/results_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastnull.report.plots import canvas, draw_bars, legend_below, styles

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

MEASURES = {"clean": "clean", "adversarial_mean": "under attack", "corruption_mean": "corrupted"}
METHODS = {
    "clean-only": ("clean images only", "#c9ccd1"),
    "universal": ("universal noise (published mode)", "#9aa0a8"),
    "random-one-view": ("random token noise, half of the images", "#6b727b"),
    "adversarial": ("adversarial training, 8/255", "#e08a2e"),
    "boundary-pixels": ("boundary noise in pixels (default)", "#1f6fb5"),
}
"""What the comparisons call a method: its name in the legend, and its colour. Controls are grey."""


PRETRAINED = {
    "none": "clean images only",
    "random-8": "random noise in pixels",
    "universal-published": "universal noise (published constants)",
    "per_image": "noise per image",
    "boundary-tokens": "boundary noise in tokens",
    "boundary-pixels": "boundary noise in pixels (default)",
    "boundary-average": "a quarter as long, averaged with the start",
    "free": "free noise (default)",
    "free-average": "ε 0.15, averaged with the start",
    "trades-2": "TRADES, 2/255",
    "adversarial-2": "adversarial training, 2/255",
    "adversarial-4": "adversarial training, 4/255",
}
AVERAGED = {"none": "none-average", "adversarial-2": "adversarial-2-average"}
"""Method → the same, averaged with the start."""


def methods_of(name: str) -> dict[str, Any]:
    """The methods of all records in a folder of results."""
    found: dict[str, Any] = {}
    for path in sorted((RESULTS / name).glob("*comparison.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))["methods"]
    return found


def trade_off() -> bytes:
    """The figure as a PNG: a point for each method, with a line to its weights averaged with the start; then PGD."""
    found = methods_of("robustness-cifar10")
    with canvas("cifar10", 1, 3, width=13, height=5.4) as (axes, done):
        _draw_radii(axes[2])
        for axis, measure in zip(axes[:2], ("clean", "corruption_mean"), strict=True):
            for style, (method, label) in zip(styles(len(PRETRAINED)), PRETRAINED.items(), strict=True):
                names = [name for name in (method, AVERAGED.get(method)) if name in found]
                if not names:
                    continue
                x, y = ([found[name]["mean"][what] for name in names] for what in ("adversarial_mean", measure))
                axis.plot(x, y, color=style["color"], linewidth=1)
                filled = {"linestyle": "", "color": style["color"], "marker": style["marker"], "markersize": 7}
                axis.plot(x[:1], y[:1], label=label, **filled)
                axis.plot(x[1:], y[1:], **filled, fillstyle="none")
            axis.set(xlabel="accuracy under attack [%]", title=MEASURES[measure])
        axes[0].set_ylabel("accuracy [%]")
        legend_below(axes[0])
        return done("", "").png


def _draw_radii(axis: Any) -> None:
    """Accuracy over the radius of PGD, a line for each method; dotted: its weights averaged with the start."""
    found = json.loads((RESULTS / "robustness-cifar10" / "pgd.json").read_text(encoding="utf-8"))["methods"]
    for style, method in zip(styles(len(PRETRAINED)), PRETRAINED, strict=True):
        for name, line in ((method, "-"), (AVERAGED.get(method), ":")):
            if name in found:
                points = {float(radius): accuracy for radius, accuracy in found[name]["accuracy"].items()}
                axis.plot(list(points), list(points.values()), color=style["color"], linewidth=1.2, linestyle=line)
                axis.plot(list(points), list(points.values()), **{**style, "linestyle": ""})
    axis.set(xlabel="radius of PGD-10 [1/255], seed 0", title="accuracy over the radius", xticks=[0, 1, 2, 4])


def draw() -> bytes:
    """The figure as a PNG: a panel for each data set, a group of bars for each measure."""
    with canvas("results", 1, 2, width=10, height=4.2) as (axes, done):
        for axis, data in zip(axes, ("digits", "photos"), strict=True):
            found = methods_of(f"robustness-{data}")
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
    for name, drawn in (("results", draw), ("cifar10", trade_off)):
        (ROOT / "docs" / "figures" / f"{name}.png").write_bytes(drawn())
