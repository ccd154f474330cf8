"""The approximate nullspace: learned noise at several norms, against permuted and random noise of equal norm."""

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
"""Scales of the learned noise."""
LAMBDAS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
"""λ of the objective E‖Δlogits‖ − λ·log‖v‖ (paper, Eq. 6)."""
CONTROLS = 3
"""Number of permuted and random noises of each norm; a row has their mean."""


def over_norm(
    encoder: FrozenEncoder,
    noise: Noise,
    images: Tensor,
    factors: Sequence[float] = FACTORS,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Row]:
    """Influence and agreement of a learned noise scaled by `factors`, and of controls of the same norms.

    Args:
        encoder: at the site of the noise.
        noise: universal; the controls are made from its first noise.
        images: [n, C, H, W] that the noise was not learned on.

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
    """Noise learned with the λ·log‖v‖ objective, for each λ from the same start and over all steps.

    Args:
        encoder: at the site.
        batches: training images [B, C, H, W].
        images: [n, C, H, W] to measure on.
        config: of the synthesis; its λ and stop rule are replaced.

    Returns:
        Rows with lambda, kind (`learned`, `permuted`, `random`), norm, influence and agreement.
    """
    pairs = embedded_pairs(encoder, images, batch_size)
    rows = []
    for value in lambdas:
        noise = synthesize(encoder, batches, replace(config, log_norm_weight=value, stop="never", solver="adamw"))
        kinds = {"learned": noise.tokens.cpu(), **controls(noise.tokens[0], CONTROLS, config.seed)}
        rows += [measured_row(encoder, found, pairs, {"lambda": value, "kind": kind}) for kind, found in kinds.items()]
    return rows


def over_finetuning(
    model: nn.Module, data: str, config: SynthesisConfig, epochs: int, *, data_dir: str | None = None
) -> list[Row]:
    """Norm and influence of the noise that is relearned in every epoch of a finetuning with universal noise.

    This is the published curve of the norm over the steps of finetuning. Each noise starts at random and stops when its
    influence is below ε, so the norm shows how large a noise the model ignores at that step. It depends on the start.

    Args:
        model: a copy of it is finetuned.
        data, data_dir: as in FinetuneConfig.
        config: eps, limit, lr, rounds, site and seed are used.
        epochs: of finetuning.

    Returns:
        Rows with step, norm, influence (on held-out images), converged (influence below ε) and updates.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # ε not met: the rows show it
        warnings.filterwarnings("ignore", message="the universal noise")
        run = FinetuneConfig(
            data=data, data_dir=data_dir, augment="universal", site=config.site, seed=config.seed,
            noise=replace(config, image_fraction=1.0, steps=None), epochs=epochs,
            out=f"{folder}/run", device=str(next(model.parameters()).device), progress=False,
        )  # fmt: skip
        finetune(run, copy.deepcopy(model))
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "refresh"]
    names = ("step", "norm", "influence", "converged", "updates")
    return [{name: record[name] for name in names} | {"converged": bool(record["converged"])} for record in records]
