"""The figure of each analysis, drawn from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastnull.analysis.measure import Row
from fastnull.analysis.spectrum import LOGITS
from fastnull.report import plots
from fastnull.report.document import Figure

Tables = Mapping[str, list[Row]]

FLOOR = 1e-18
"""Shown for 0 on a logarithmic axis."""


def draw(name: str, tables: Tables, caption: str) -> Figure:
    """The figure of the analysis `name` from the tables of `analyze`. Raises ImportError without matplotlib."""
    draws: dict[str, Callable[[Tables, str], Figure]] = {
        "exact": _exact,
        "approximate": _approximate,
        "spectrum": _spectrum,
        "transfer": _transfer,
    }
    return draws[name](tables, caption)


def _exact(tables: Tables, caption: str) -> Figure:
    with plots.canvas("exact", 1, 3, width=14, height=4.6) as (axes, done):
        rows = [row for row in tables["dimensions"] if row["reason"] is None]
        places = range(len(rows))
        axes[0].barh(places, [100 * row["fraction"] for row in rows], color=plots.STYLES[4]["color"])
        axes[0].set_yticks(places, [row["model"] for row in rows], fontsize=7)
        axes[0].invert_yaxis()
        axes[0].set(xlabel="of a patch's dimensions in the nullspace [%]", xlim=(0, 100))
        _energy_bars(axes[1], tables["energy"])
        # white noise gives nearly the same line in every dtype
        leaks = [row for row in tables["leak"] if row["noise"] == "exact" or row["dtype"] == "float32"]
        for style, ((dtype, noise), points) in zip(
            plots.styles(len(leaks)), _curves(leaks, ("dtype", "noise"), "rms", "logits"), strict=False
        ):
            axes[2].plot(*points, label=dtype if noise == "exact" else f"white noise, {dtype}", **style)
        axes[2].set(
            xscale="log", yscale="log", xlabel="rms of the noise [pixels in 0 to 1]", ylabel="relative change of logits"
        )
        if leaks:
            axes[2].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(0, 0.33))  # between the dtypes
        return done("Nullities of patch embeddings; image energy in the nullspace; leak of its noise", caption)


def _energy_bars(axis: Any, rows: list[Row]) -> None:
    labels = list(dict.fromkeys(row["images"] for row in rows))
    bars = [("pixels", "model"), ("contrast", "model"), ("contrast", "random")]
    titles = ("all of it, this model", "contrast, this model", "contrast, random weights")
    for index, ((column, weights), title) in enumerate(zip(bars, titles, strict=True)):
        shares = [100 * row[column] for label in labels for row in rows
                  if row["images"] == label and row["weights"] == weights]  # fmt: skip
        x = [place + 0.27 * (index - 1) for place in range(len(shares))]
        axis.bar(x, shares, 0.25, label=title, color=plots.STYLES[2 * index + 1]["color"])
    axis.set_xticks(range(len(labels)), labels)
    axis.set(ylabel="of the image energy in the nullspace [%]", ylim=(0, 110))
    axis.legend(frameon=False, fontsize=7, ncols=2)


def _approximate(tables: Tables, caption: str) -> Figure:
    with plots.canvas("approximate", 2, 3, width=13, height=8) as (axes, done):
        for column, (key, label) in enumerate((("influence", "influence"), ("agreement", "same prediction [%]"))):
            for axis, table, x in ((axes[column], "norm", "norm"), (axes[3 + column], "lambda", "lambda")):
                for style, ((kind,), (xs, ys)) in zip(
                    plots.styles(3), _curves(tables[table], ("kind",), x, key), strict=False
                ):
                    scaled = [100 * y for y in ys] if key == "agreement" else ys
                    axis.plot(xs, scaled, label=kind, **style)
                unit = "norm of the noise [token units]" if x == "norm" else "λ of λ·log‖v‖"
                axis.set(xscale="log", xlabel=unit, ylabel=label)
                axis.xaxis.set_minor_formatter("")
                if key == "influence":
                    axis.set_yscale("log")
        axes[0].legend(frameon=False)
        _two_scales(axes[2], tables["synthesis"], "step of the synthesis")
        if tables["finetuning"]:
            _two_scales(axes[5], tables["finetuning"], "step of the finetuning")
        else:
            axes[5].set_axis_off()
        return done("Influence and agreement of learned, permuted and random noise; its norm over training", caption)


def _two_scales(axis: Any, rows: list[Row], xlabel: str) -> None:
    """Norm on the left, influence on the right."""
    steps = [row["step"] for row in rows]
    for side, key, style in ((axis, "norm", plots.STYLES[4]), (axis.twinx(), "influence", plots.STYLES[5])):
        side.plot(steps, [row[key] for row in rows], color=style["color"], linestyle=style["linestyle"])
        side.set_ylabel(key, color=style["color"])
        if key == "influence":
            side.set_yscale("log")
            side.grid(visible=False)
        else:
            side.set_ylim(bottom=0)
    axis.set_xlabel(xlabel)


def _spectrum(tables: Tables, caption: str) -> Figure:
    with plots.canvas("spectrum", 1, 2, width=11, height=4.6) as (axes, done):
        depths = list(dict.fromkeys(row["depth"] for row in tables["values"]))
        for style, depth in zip(plots.styles(len(depths)), depths, strict=True):
            found = [row for row in tables["values"] if row["depth"] == depth and row["index"] is not None]
            label = depth if depth == LOGITS else f"after block {depth}"
            # markers would hide the line
            line = {key: value for key, value in style.items() if key != "marker"}
            axes[0].plot(
                [row["index"] for row in found], [max(row["value"], FLOOR) for row in found], label=label, **line
            )
        axes[0].set(xlabel="direction", ylabel="singular value [output per token unit]", yscale="log", xscale="log")
        axes[0].legend(frameon=False, fontsize=8)
        for style, ((kind, on), points) in zip(
            plots.styles(6), _curves(tables["along"], ("kind", "on"), "norm", "influence"), strict=False
        ):
            axes[1].plot(*points, label=f"{kind}, {on}", **style)
        axes[1].set(xlabel="norm of the noise [token units]", ylabel="influence, measured", xscale="log", yscale="log")
        axes[1].legend(frameon=False, fontsize=8)
        return done("Singular values of the Jacobian for each depth; influence of noise along its directions", caption)


def _transfer(tables: Tables, caption: str) -> Figure:
    kinds = list(dict.fromkeys(row["kind"] for row in tables["matrix"]))
    names = list(dict.fromkeys(row["source"] for row in tables["matrix"]))
    with plots.canvas("transfer", 1, len(kinds), width=4.6 * len(kinds), height=4.4) as (axes, done):
        for axis, kind in zip(axes, kinds, strict=True):
            cells = {(row["source"], row["target"]): row for row in tables["matrix"] if row["kind"] == kind}
            agreement = [[cells[a, b]["agreement"] for b in names] for a in names]
            shown = [[float("nan") if value is None else 100 * value for value in line] for line in agreement]
            axis.imshow(shown, cmap="cividis", vmin=0, vmax=100)
            for i, a in enumerate(names):
                for j, b in enumerate(names):
                    cell = cells[a, b]
                    if cell["agreement"] is not None:
                        relative = "" if cell["ratio"] is None else f"\n×{cell['ratio']:.2g}"
                        colour = "black" if cell["agreement"] > 0.55 else "white"
                        axis.text(j, i, f"{100 * cell['agreement']:.0f} %{relative}", ha="center", va="center",
                                  color=colour, fontsize=8)  # fmt: skip
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set(title=f"{kind} noise", xlabel="tried on", ylabel="made on")
            axis.grid(visible=False)
        return done("Fraction of unchanged predictions, for noise made on one model and tried on another", caption)


def _curves(
    rows: list[Row], keys: tuple[str, ...], x: str, y: str
) -> Iterable[tuple[tuple[str, ...], tuple[list[float], list[float]]]]:
    """Rows grouped by `keys`: the key and (xs, ys), without None."""
    groups: dict[tuple[str, ...], tuple[list[float], list[float]]] = {}
    for row in rows:
        if row[y] is not None:
            xs, ys = groups.setdefault(tuple(str(row[key]) for key in keys), ([], []))
            xs.append(row[x])
            ys.append(max(row[y], FLOOR))
    return groups.items()
