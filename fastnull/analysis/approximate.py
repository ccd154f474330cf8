"""The approximate nullspace: what learned noise may be scaled to, against permuted and random noise of equal norm."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from fastnull.analysis.measure import Row, controls, embedded_pairs, measured_row
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.loop import finetune
from fastnull.noise import Noise
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.run import synthesize

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""What the learned noise is scaled by."""
LAMBDAS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
"""λ of the objective E‖Δlogits‖ − λ·log‖v‖ (paper, Eq. 6)."""
CONTROLS = 3
"""Permuted and random noises of each norm; their mean is what a row holds."""


def over_norm(
    encoder: FrozenEncoder,
    noise: Noise,
    images: Tensor,
    factors: Sequence[float] = FACTORS,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Row]:
    """Influence and agreement of a learned noise at several lengths, and of controls of the same lengths.

    Args:
        encoder: at the site of the noise.
        noise: universal; all its noises are measured, and the controls are made of the first.
        images: [n, C, H, W] that the noise was not learned on.
        factors: lengths, in lengths of the noise.
        batch_size: images at once.
        seed: of the controls.

    Returns:
        Rows with kind (`learned`, `permuted`, `random`), factor, norm, influence and agreement.
    """
    pairs = embedded_pairs(encoder, images, batch_size)
    kinds = {"learned": noise.tokens, **controls(noise.tokens[0], CONTROLS, seed)}
    return [
        measured_row(encoder, factor * tokens.cpu(), pairs, {"kind": kind, "factor": factor})
        for kind, tokens in kinds.items()
        for factor in factors
    ]


def over_lambda(
    encoder: FrozenEncoder,
    batches: Sequence[Tensor],
    images: Tensor,
    config: SynthesisConfig,
    lambdas: Sequence[float] = LAMBDAS,
    *,
    batch_size: int = 64,
) -> list[Row]:
    """Noise that is learned to be long too: all steps of the λ·log‖v‖ objective, for each λ from the same start.

    Args:
        encoder: at the site.
        batches: training images [B, C, H, W].
        images: [n, C, H, W] to judge on.
        config: of the synthesis; its λ and stop rule are replaced.
        lambdas: weights of log‖v‖.
        batch_size: images at once, in judging.

    Returns:
        Rows with lambda, kind (`learned`, `permuted`, `random`), norm, influence and agreement.
    """
    pairs = embedded_pairs(encoder, images, batch_size)
    rows = []
    for value in lambdas:
        noise = synthesize(encoder, batches, replace(config, log_norm_weight=value, stop="never"))
        kinds = {"learned": noise.tokens.cpu(), **controls(noise.tokens[0], CONTROLS, config.seed)}
        rows += [measured_row(encoder, found, pairs, {"lambda": value, "kind": kind}) for kind, found in kinds.items()]
    return rows


def over_finetuning(
    model: nn.Module, data: str, config: SynthesisConfig, epochs: int, *, data_dir: str | None = None
) -> list[Row]:
    """Norm and influence of the noise that is learned anew for every epoch of a finetuning with it.

    The published curve of this kind shows the norm over the steps of finetuning. Each noise starts at random and is
    stopped where its influence meets ε, so the norm says how large a noise the model of that step ignores, and
    depends on the length of the start.

    Args:
        model: a copy of it is finetuned.
        data, data_dir: as FinetuneConfig takes them.
        config: eps, limit, lr, rounds, site and seed are used.
        epochs: of finetuning.

    Returns:
        Rows with step, norm, influence (on held-out images), converged (whether it is below ε) and updates.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # that ε was not met: the rows say it
        warnings.filterwarnings("ignore", message="the universal noise")
        run = FinetuneConfig(
            data=data, data_dir=data_dir, augment="universal", site=config.site, seed=config.seed,
            noise=replace(config, image_fraction=1.0, steps=None), epochs=epochs,
            out=f"{folder}/run", device=str(next(model.parameters()).device), progress=False,
        )  # fmt: skip
        finetune(run, copy.deepcopy(model))
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "refresh"]
    return [
        {
            "step": record["step"],
            "norm": record["norm"],
            "influence": record["influence"],
            "converged": bool(record["converged"]),
            "updates": record["updates"],
        }
        for record in records
    ]
