"""Try limits and values of ε on one batch before a training run: influence and norm for each pair.

    for row in try_settings(model, images, mode="boundary", site="pixels"):
        print(row.limit, row.eps, row.norm, row.influence, row.agreement)

`boundary` noise takes few steps. If the influence of the random start is far below ε, the noise stays short of the
border; if it is far above, the noise stays visible whatever the model learns. `fastnull tune` prints and draws the
table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import check_choice, check_number
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.progress import progress_bar
from fastnull.record import provenance, replacing, write_json
from fastnull.rng import KeyedRandom
from fastnull.synthesis.batches import embed_batch
from fastnull.synthesis.config import SynthesisConfig, recommended_site
from fastnull.synthesis.objective import influence
from fastnull.synthesis.run import synthesize
from fastnull.synthesis.solvers import norms, perturb
from fastnull.synthesis.starts import draw_start

MODES = ("boundary", "per_image", "universal")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Limits to try by default, as multiples of the limit that NullspaceAugment takes."""
EPS = (0.03, 0.1, 0.3, 1.0)
UNIVERSAL_STEPS = 30


@dataclass(frozen=True)
class Tried:
    """A setting and its result.

    Attributes:
        limit: of the uniform start, in units of the site.
        eps: influence that the synthesis aimed at; None for the start itself.
        norm: mean L2 norm of the noises.
        influence: mean over the images; in universal mode over the half that the noise was not learned on.
        agreement: fraction of these images whose prediction stays the same under the noise.
        converged: fraction of the noises that met ε (boundary: within a factor of 2); None for the start.
        seconds: time of the synthesis.
    """

    limit: float
    eps: float | None
    norm: float
    influence: float
    agreement: float
    converged: float | None
    seconds: float


def try_settings(
    model: nn.Module | FrozenEncoder,
    images: Tensor,
    *,
    mode: str = "boundary",
    site: str | None = None,
    limits: Sequence[float] | None = None,
    eps: Sequence[float] = EPS,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Tried]:
    """Synthesise noise for every pair of limit and ε, from the same random draw.

    Args:
        model: a ViT, or a FrozenEncoder at the site.
        images: [B, C, H, W] as the model takes them; universal noise is learned on half of them.
        mode: boundary, per_image or universal.
        site: patch, block0 or pixels; None takes the recommended one for the mode.
        limits: None takes FACTORS times the default of the mode.
        eps: influences to aim at.
        steps: of the synthesis; None takes the default of the mode (universal: 30).
        seed: of the starts.
        progress: show a progress bar.

    Returns:
        For each limit the row of the start, then one row per ε.

    Raises:
        ValueError: an unknown mode or site, empty limits or eps, fewer than two images in universal mode.
    """
    check_choice("mode", mode, MODES)
    encoder = model if isinstance(model, FrozenEncoder) else FrozenEncoder(model, site=site or recommended_site(mode))
    base = SynthesisConfig.recommended(mode, encoder.site, steps=steps, seed=seed)
    limits = [factor * base.limit for factor in FACTORS] if limits is None else limits
    for name, values in (("limits", limits), ("eps", eps)):
        if not values:
            raise ValueError(f"{name} must hold at least one number")
        for value in values:
            check_number(name, value, 0, exclusive=True)
    if steps is not None:
        check_number("steps", steps, 1)
    if mode == "universal" and len(images) < 2:
        raise ValueError(f"images must be at least 2 in universal mode; got {len(images)}")
    if base.steps is None:
        base = replace(base, steps=UNIVERSAL_STEPS)
    learned, judged = images.chunk(2) if mode == "universal" else (images, images)
    pair = embed_batch(encoder, judged)
    rows = []
    with progress_bar(len(limits) * (1 + len(eps)), show=progress, desc="tune", unit=" setting") as bar:
        for limit in limits:
            tokens = pair[0][:1] if mode == "universal" else pair[0]
            source = KeyedRandom(seed, "image", torch.arange(len(tokens), device=tokens.device))
            start = draw_start(tokens, replace(base, limit=limit), source)
            rows.append(_tried(encoder, start.noise, pair, limit))
            bar.update()
            for value in eps:
                begin = time.perf_counter()
                config = replace(base, limit=limit, eps=value)
                noise = synthesize(encoder, [learned], config, check=judged if mode == "universal" else None)
                seconds = time.perf_counter() - begin
                about = {"converged": float(noise.converged.float().mean()), "seconds": seconds}
                rows.append(replace(_tried(encoder, noise.tokens, pair, limit), eps=value, **about))
                bar.update()
    return rows


def _tried(encoder: FrozenEncoder, noise: Tensor, pair: tuple[Tensor, Tensor], limit: float) -> Tried:
    tokens, clean = pair
    noisy = encoder(perturb(encoder, tokens, noise.to(encoder.device)))
    return Tried(
        limit=limit,
        eps=None,
        norm=float(norms(noise).mean()),
        influence=float(influence(clean, noisy).mean()),
        agreement=float((clean.argmax(1) == noisy.argmax(1)).float().mean()),
        converged=None,
        seconds=0.0,
    )


def format_tried(rows: Sequence[Tried], site: str) -> str:
    """The rows as a table, with limits in pixels in units of 1/255."""
    unit = 255 if site == "pixels" else 1
    head = f"{'limit' + (' /255' if unit > 1 else ''):>11}{'eps':>8}{'norm':>10}{'influence':>11}{'same':>8}{'met':>7}"
    lines = [head]
    for row in rows:
        eps, met = ("start", "") if row.eps is None else (f"{row.eps:g}", f"{100 * (row.converged or 0):.0f} %")
        lines.append(
            f"{row.limit * unit:>11.3g}{eps:>8}{row.norm:>10.3g}{row.influence:>11.3g}"
            f"{100 * row.agreement:>6.1f} %{met:>7}"
        )
    lines.append("influence: mean over images of the sum over classes of (p - p~)^2. same: predictions that stay.")
    return "\n".join(lines) + "\n"


def write_tried(
    rows: Sequence[Tried], folder: str | os.PathLike[str], about: dict[str, Any], device: str
) -> list[Path]:
    """Write tune.json (rows, settings and provenance) and tune.png into a folder; returns their paths.

    Raises:
        ImportError: matplotlib is not installed; tune.json is written nevertheless.
    """
    folder = Path(folder)
    record, picture = folder / "tune.json", folder / "tune.png"
    write_json(
        record,
        {"settings": about, "rows": [asdict(row) for row in rows], "provenance": provenance(torch.device(device))},
    )
    _draw(rows, picture)
    return [record, picture]


def _draw(rows: Sequence[Tried], path: Path) -> None:
    """Plot influence over norm, one line per limit."""
    from fastnull.report.plots import import_pyplot

    plt = import_pyplot()
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for limit in dict.fromkeys(row.limit for row in rows):
        points = sorted((row for row in rows if row.limit == limit), key=lambda row: row.norm)
        (line,) = ax.plot([row.norm for row in points], [row.influence for row in points], "o-", label=f"{limit:.3g}")
        start = next(row for row in points if row.eps is None)
        ax.plot(start.norm, start.influence, "s", markersize=9, fillstyle="none", color=line.get_color())
    for value in dict.fromkeys(row.eps for row in rows if row.eps is not None):
        ax.axhline(value, color="#8C8C8C", linewidth=0.6, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="L2 norm of the noise", ylabel="influence")
    ax.set_title("noise by its limit (squares: its random start; dotted: ε)", fontsize=9, loc="left")
    ax.legend(title="limit", frameon=False, fontsize=8)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=150)
    plt.close(figure)
