"""What each setting of a universal synthesis brings: `python -m benchmarks.synthesis_settings`, a table for docs.

The trained digits ViT, ε 0.03, several starts, everything in turns in one run. Of each setting: its time for one noise
relative to the published loop's, updates, the norm of the noise where its influence on images that nobody used is ε
(so that noises of different influence can be compared), and how alike the noises of different starts are.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import published_synthesis
from benchmarks.bench_synthesis import DIGITS_BATCH, DIGITS_EPS, DIGITS_STEPS
from benchmarks.models import make_start, trained_digits
from fastnull.bench import BenchSettings, format_table
from fastnull.encoder import FrozenEncoder
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.record import provenance
from fastnull.synthesis import SynthesisConfig, synthesize, warm_start
from fastnull.synthesis.solvers import norms
from fastnull.synthesis.universal import judge, scaled_to_eps

TRAINING = 9
"""Batches: the last one is what a synthesis judges its noise on, the rest of the images nobody uses."""
BASE = SynthesisConfig(eps=DIGITS_EPS, limit=1.0, contrast=0.0)
SETTINGS = {
    "default": BASE,
    "solver=adamw": replace(BASE, solver="adamw", steps=DIGITS_STEPS),
    "final_scale": replace(BASE, final_scale=True),
    "stop=batch": replace(BASE, stop="batch"),
    "schedule=constant": replace(BASE, schedule="constant"),
    "growing": replace(BASE, growing=True, rounds=20),
    "radius=0.05": replace(BASE, radius=0.05),
    "radius=0.2": replace(BASE, radius=0.2),
}
WARM = (0.0, 0.25, 0.5, 0.75, 1.0)
Made = tuple[Tensor, list[int]]
"""Noises [S, N, D] and the updates of each."""


class Loader:
    """Batches that come from a loader, and are read anew in each round."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all settings (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=4, metavar="N", help="noises of each (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = BenchSettings(device="cpu", threads=1)
    model, images = trained_digits(settings)
    *batches, check = images.split(DIGITS_BATCH)[:TRAINING]
    unseen = images[TRAINING * DIGITS_BATCH :]
    starts = torch.stack([make_start(model, replace(settings, seed=key)) for key in range(args.starts)])
    encoder = FrozenEncoder(model)

    def published() -> Made:
        ends = [published_synthesis(model, batches, s, torch.float32, DIGITS_EPS, DIGITS_STEPS) for s in starts]
        return torch.stack([noise for noise, _ in ends]), [steps for _, steps in ends]

    def ours(config: SynthesisConfig, source: Any = batches, encoder: Any = encoder, starts: Any = starts) -> Made:
        ends = [synthesize(encoder, source, config, check=check, start=start[None]) for start in starts]
        return torch.cat([noise.tokens for noise in ends]), [int(noise.steps) for noise in ends]

    def together() -> Made:
        noise = synthesize(encoder, batches, replace(BASE, count=len(starts)), check=check, start=starts)
        return noise.tokens, noise.steps.tolist()

    runs: dict[str, Callable[[], Made]] = {"published loop": published}
    runs |= {name: lambda config=config: ours(config) for name, config in SETTINGS.items()}
    runs["batches of a loader"] = lambda: ours(BASE, Loader(batches))
    runs["the same, keep=True"] = lambda: ours(replace(BASE, keep=True), Loader(batches))
    runs[f"count={len(starts)}"] = together
    last, seconds = table(runs, model, unseen, args.rounds)

    later = finetune(FinetuneConfig(augment="none", epochs=1, seed=1, device="cpu", progress=False), trainable(model))
    newer = later.model.requires_grad_(False)
    encoder_later = FrozenEncoder(newer)
    warm = {}
    for fraction in WARM:
        config = replace(BASE, warm=fraction)
        first = torch.cat([warm_start(replace(config, seed=1000 + k), old[None]) for k, old in enumerate(last)])
        warm[f"warm={fraction:g}"] = lambda config=config, first=first: ours(config, batches, encoder_later, first)
    print("\nfor the model one clean epoch later, from the noises of `default`:")
    table(warm, newer, unseen, args.rounds, seconds)
    print(provenance("cpu", threads=1))


def trainable(model: nn.Module) -> nn.Module:
    """A copy that can be trained."""
    return copy.deepcopy(model).requires_grad_(True)


def table(
    runs: dict[str, Callable[[], Made]], model: nn.Module, unseen: Tensor, rounds: int, base: float | None = None
) -> tuple[Tensor, float]:
    """Time the runs in turns and print them; returns the noises of `default`, and the seconds of the published loop."""
    made, seconds = {name: run() for name, run in runs.items()}, {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(column) for name, column in seconds.items()}
    base = base or medians["published loop"]
    oracle = FrozenEncoder(model, backend="reference")
    pair = oracle.embed(unseen)
    pairs = [(pair, oracle(pair))]
    lines = [("setting", "x published", "updates", "norm", "unseen influence", "norm at eps", "cosine")]
    for name, (noises, steps) in made.items():
        noises = noises.float()
        seen = judge(oracle, noises, pairs)
        scaled, _ = scaled_to_eps(oracle, noises, seen, pairs, DIGITS_EPS, larger=True)
        alike = torch.cosine_similarity(noises.flatten(1)[:, None], noises.flatten(1)[None], dim=-1)
        others = (alike.sum() - len(noises)) / max(1, len(noises) * (len(noises) - 1))
        lines.append(
            (name, f"{base / medians[name]:.2f}", ", ".join(map(str, steps)), f"{float(norms(noises).mean()):.1f}",
             f"{float(seen.mean()):.4f}", f"{float(norms(scaled).mean()):.1f}", f"{float(others):.2f}")
        )  # fmt: skip
    print(format_table(lines), flush=True)
    return made.get("default", (torch.empty(0), []))[0], base


if __name__ == "__main__":
    main()
