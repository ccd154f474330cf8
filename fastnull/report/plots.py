"""The figures of a report, drawn once as SVG in the page's colours and as PNG on white."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastnull.report.document import Figure

INK = "#010203"
"""Placeholder of the text colour: black in the PNG, `currentColor` in the SVG."""

# Okabe and Ito's colours for colour-blind readers, then some of Tol's; markers and dashes differ too
STYLES = (
    {"color": INK, "marker": "o", "linestyle": "--"},
    {"color": "#E69F00", "marker": "s", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "^", "linestyle": "-"},
    {"color": "#009E73", "marker": "D", "linestyle": "-"},
    {"color": "#0072B2", "marker": "v", "linestyle": "-"},
    {"color": "#D55E00", "marker": "P", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "X", "linestyle": "-"},
    {"color": "#8C8C8C", "marker": "<", "linestyle": ":"},
    {"color": "#882255", "marker": ">", "linestyle": "-"},
    {"color": "#999933", "marker": "p", "linestyle": "-."},
    {"color": "#332288", "marker": "h", "linestyle": "-"},
)

_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")

Series = Mapping[str, Sequence[tuple[float, float, float]]]
"""Label → points (x, mean, standard deviation)."""
Bars = Mapping[str, Sequence[tuple[float, float]]]
"""Label → (mean, standard deviation) for each group of bars."""


def import_pyplot() -> ModuleType:
    """matplotlib.pyplot for files; raises ImportError with the way to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"a report needs matplotlib: pip install fastnull[demo] ({error})") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def accuracy_over_eps(panels: Mapping[str, Series], norm: str, caption: str) -> Figure:
    """One panel per attack: accuracy in % over its radius, a line per method, with standard deviations."""
    with canvas("accuracy_over_eps", 1, len(panels), width=10, height=4.6) as (axes, done):
        for axis, (attack, series) in zip(axes, panels.items(), strict=True):
            _draw_lines(axis, attack, series, norm)
        axes[0].set_ylabel("accuracy [%]")
        legend_below(axes[0])
        worst = {
            attack: ", ".join(f"{label} {points[-1][1]:.0f} %" for label, points in series.items())
            for attack, series in panels.items()
        }
        alt = "Accuracy falls with the radius of the attack. At the largest radius, " + "; ".join(
            f"{attack}: {text}" for attack, text in worst.items()
        )
        return done(alt, caption)


def _draw_lines(axis: Any, attack: str, series: Series, norm: str) -> None:
    unit = "1/255 of the pixel range" if norm == "linf" else "L2 norm, pixels in [0, 1]"
    for style, (label, points) in zip(styles(len(series)), series.items(), strict=True):
        x, mean, deviation = zip(*points, strict=True)
        axis.errorbar(x, mean, yerr=deviation, label=label, capsize=2.5, elinewidth=1, **style)
    axis.set(title=attack, xlabel=f"radius ε of the attack [{unit}]", ylim=(0, 100))
    axis.set_xticks(sorted({point[0] for points in series.values() for point in points}))


def overview(attack: str, series: Series, norm: str, groups: Sequence[str], values: Bars, caption: str) -> Figure:
    """Accuracy in % over the radius of an attack, and bars for groups such as clean and corrupted."""
    with canvas("overview", 1, 2, width=10, height=4.6) as (axes, done):
        _draw_lines(axes[0], attack, series, norm)
        axes[0].set_ylabel("accuracy [%]")
        draw_bars(axes[1], groups, values)
        axes[1].set_title("mean accuracy")
        legend_below(axes[0])
        means = (f"{label} {', '.join(f'{mean:.0f}' for mean, _ in pairs)} %" for label, pairs in values.items())
        return done(f"Accuracy over the radius of {attack}; {', '.join(groups)}: " + "; ".join(means), caption)


def draw_bars(axis: Any, groups: Sequence[str], values: Bars, colours: Sequence[str] | None = None) -> None:
    """A bar per label in each group, with accuracies in %."""
    width = 0.84 / max(1, len(values))
    colours = colours or [style["color"] for style in styles(len(values))]
    for index, (colour, (label, pairs)) in enumerate(zip(colours, values.items(), strict=True)):
        x = [place + (index - (len(values) - 1) / 2) * width for place in range(len(groups))]
        mean, deviation = zip(*pairs, strict=True)
        whiskers = {"elinewidth": 1, "ecolor": "#808080"}
        axis.bar(x, mean, width * 0.92, yerr=deviation, label=label, color=colour, error_kw=whiskers)
    axis.set_xticks(range(len(groups)), [name.replace("_", "\n") for name in groups])
    axis.set_ylim(0, 100)
    axis.grid(axis="x", visible=False)


def corruption_bars(names: Sequence[str], values: Bars, caption: str) -> Figure:
    """A group of bars per corruption, a bar per method."""
    with canvas("corruptions", 1, 1, width=10, height=4.6) as (axes, done):
        draw_bars(axes[0], names, values)
        axes[0].set_ylabel("accuracy [%]")
        legend_below(axes[0])
        means = (f"{label} {sum(m for m, _ in pairs) / len(pairs):.0f} %" for label, pairs in values.items())
        return done("Accuracy under each corruption; means over them: " + ", ".join(means), caption)


def influence_over_norm(curves: Mapping[str, Sequence[tuple[float, float]]], eps: float, caption: str) -> Figure:
    """Influence over the L2 norm of a noise in token units, for the learned noise and its permutations."""
    with canvas("influence", 1, 1, width=7, height=4.2) as (axes, done):
        axis = axes[0]
        for style, (label, points) in zip((STYLES[4], STYLES[5]), curves.items(), strict=False):
            norms, influences = zip(*points, strict=True)
            axis.plot(norms, [max(value, 1e-8) for value in influences], label=label, **style)
        axis.axhline(eps, color=INK, linewidth=1, linestyle=":")
        axis.annotate(f"ε = {eps:g}", (0.99, eps), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axis.set(xlabel="L2 norm of the noise [token units]", ylabel="influence on test images", yscale="log")
        axis.legend(frameon=False)
        ends = ", ".join(f"{label} {points[-1][1]:.2g}" for label, points in curves.items())
        return done(f"Influence grows with the norm of the noise; at the largest norm: {ends}", caption)


def exact_noise(rows: Mapping[str, Tensor], titles: Mapping[str, Sequence[str]], alt: str, caption: str) -> Figure:
    """Rows of pictures: label → images [B, C, H, W] in [0, 1], with titles."""
    columns = max(len(images) for images in rows.values())
    size = {"width": 1.7 * columns + 1.4, "height": 2.0 * len(rows)}
    with canvas("exact_nullspace", len(rows), columns, **size) as (axes, done):
        for row, (label, images) in enumerate(rows.items()):
            for column, image in enumerate(images):
                axis = axes[row * columns + column]
                _picture(axis, image)
                axis.set_title(titles[label][column], fontsize=9)
            axes[row * columns].set_ylabel(label)
        return done(alt, caption)


def token_noise(norms: Tensor, image: Tensor, noise: Tensor, noisy: Tensor, alt: str, caption: str) -> Figure:
    """Token noise: its norm per token [rows, columns], and its pre-image on a picture (each [C, H, W])."""
    with canvas("token_noise", 1, 4, width=10, height=2.9) as (axes, done):
        shown = axes[0].imshow(norms.numpy(), cmap="cividis", interpolation="nearest")
        axes[0].set(xticks=[], yticks=[])
        axes[0].grid(visible=False)
        axes[0].spines[:].set_visible(False)
        bar = axes[0].figure.colorbar(shown, ax=axes[0], fraction=0.046)
        bar.set_label("token units")
        bar.outline.set_visible(False)
        largest = float(noise.abs().max()) or 1.0
        for axis, picture, title in (
            (axes[1], 0.5 + noise / (2 * largest), f"as pixels, ±{largest:.2g}"),
            (axes[2], image, "a picture"),
            (axes[3], noisy, "picture + noise, cut to [0, 1]"),
        ):
            _picture(axis, picture)
            axis.set_title(title, fontsize=9)
        axes[0].set_title("norm of each token's noise", fontsize=9)
        return done(alt, caption)


def _picture(axis: Any, image: Tensor) -> None:
    axis.imshow(image.detach().clamp(0, 1).permute(1, 2, 0).to(torch.float32).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def styles(count: int) -> list[dict[str, Any]]:
    styles = [dict(STYLES[index % len(STYLES)], markersize=5, linewidth=1.7) for index in range(count)]
    for again in styles[len(STYLES) :]:
        again |= {"markerfacecolor": "white", "linestyle": (0, (1, 1))}
    return styles


def legend_below(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(handles, labels, frameon=False, ncols=min(3, len(labels)), loc="outside lower center")


@contextmanager
def canvas(name: str, rows: int, columns: int, *, width: float, height: float) -> Iterator[tuple[list[Any], Any]]:
    """Axes, and a function (alt, caption) → Figure that renders them in both formats."""
    plt = import_pyplot()
    settings = {
        "font.size": 10.5,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#808080",
        "grid.alpha": 0.25,
        "svg.fonttype": "none",
        # ids must be unique on the page
        "svg.hashsalt": name,
        "font.family": ["DejaVu Sans"],
        **dict.fromkeys(_INKED, INK),
    }
    with plt.rc_context(settings):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)

        def done(alt: str, caption: str) -> Figure:
            return Figure(name=name, svg=_svg(figure), png=_png(figure), alt=alt, caption=caption)

        try:
            yield list(axes.flat), done
        finally:
            plt.close(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # ids of groups repeat between figures and are not referenced
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif").replace(INK, "currentColor")
    # text without a colour is black by default
    return text.replace("<svg", '<svg fill="currentColor"', 1)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
