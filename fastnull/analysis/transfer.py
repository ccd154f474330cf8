"""Transfer of noise between models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastnull.analysis.measure import Row, controls, embedded_pairs, measure
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.nullspace.patch import PatchNullspace
from fastnull.rng import generator
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.objective import influence
from fastnull.synthesis.run import synthesize
from fastnull.synthesis.solvers import norms
from fastnull.vit import frozen
from fastnull.vit.base import logits_of

EXACT_RMS = 0.1
"""Root mean square of exact nullspace noise for pixels in [0, 1]; the sum is not clamped."""
CONTROLS = 3


def transfer(
    models: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    images: Tensor,
    configs: Mapping[str, SynthesisConfig],
    *,
    batch_size: int = 64,
) -> list[Row]:
    """Influence and agreement of each model's noise on every model, and of controls of equal norm.

    Kinds of noise: `exact`, image noise of the source's patch nullspace, and learned universal noise for each of
    `configs`.

    Args:
        models: name → a model that takes pixels in [0, 1]; at least two, for images of one size.
        batches: training images [B, C, H, W].
        images: [n, C, H, W] to measure on.
        configs: kind of noise → settings of the synthesis.

    Returns:
        Rows with kind, source, target, norm, influence, agreement, control (influence of permuted noise on the target),
        ratio (influence / control; below 1 the noise affects the target less than chance) and `reason`: why the
        others are None (no nullspace, no such site, or another shape).

    Raises:
        ValueError: fewer than two models.
    """
    if len(models) < 2:
        raise ValueError(f"transfer needs two models or more; got {len(models)}")
    rows: list[Row] = []
    for source, model in models.items():
        for kind, config in {"exact": None, **configs}.items():
            try:
                if config is None:
                    made = PatchNullspace.from_model(model).sample(images[:1].cpu(), EXACT_RMS, generator(0))[0]
                else:
                    made = synthesize(model, batches, replace(config, mode="universal", count=1)).tokens[0].cpu()
            except ValueError as error:
                rows += [_row(kind, source, target, reason=str(error)) for target in models]
                continue
            permuted = controls(made, CONTROLS)["permuted"]
            for target, other in models.items():
                try:
                    judge = _judge(other, config, images, batch_size)
                    found, same = judge(made[None])
                except ValueError as error:
                    rows.append(_row(kind, source, target, reason=str(error)))
                    continue
                control, _ = judge(permuted)
                relative = found / control if control else None
                numbers = (float(norms(made[None])[0]), found, same, control, relative)
                rows.append(_row(kind, source, target, numbers))
    return rows


Judge = Callable[[Tensor], tuple[float, float]]
"""Noises [M, ...] → their influence and agreement."""


def _judge(model: nn.Module, config: SynthesisConfig | None, images: Tensor, batch_size: int) -> Judge:
    if config is None:
        return lambda noises: _uncut(model, noises, images, batch_size)
    encoder = FrozenEncoder(model, site=config.site)
    pairs = embedded_pairs(encoder, images, batch_size)
    shape = pairs[0][0].shape[1:]

    def judge(noises: Tensor) -> tuple[float, float]:
        if noises.shape[1:] != shape:
            raise ValueError(f"noise of shape {list(noises.shape[1:])}, the target's {config.site} is {list(shape)}")
        return measure(encoder, noises, pairs)

    return judge


@torch.no_grad()
def _uncut(model: nn.Module, noises: Tensor, images: Tensor, batch_size: int) -> tuple[float, float]:
    """Influence and agreement of image noise without clamping, which would take it out of the kernel."""
    influences, same = [], []
    device = next(model.parameters()).device
    with frozen(model):
        for batch in images.to(device).split(batch_size):
            clean = logits_of(model(batch))
            for noise in noises.to(device):
                noisy = logits_of(model(batch + noise))
                influences.append(influence(clean, noisy))
                same.append(clean.argmax(1) == noisy.argmax(1))
    return float(torch.cat(influences).mean()), float(torch.cat(same).float().mean())


def _row(
    kind: str, source: str, target: str, numbers: Sequence[float | None] = (None,) * 5, reason: str | None = None
) -> Row:
    names = ("norm", "influence", "agreement", "control", "ratio")
    about = {"kind": kind, "source": source, "target": target}
    return {**about, **dict(zip(names, numbers, strict=True)), "reason": reason}
