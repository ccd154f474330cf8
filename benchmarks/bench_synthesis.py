"""Whole universal syntheses, from random starts to noise within ε: the published loop against our default.

The published loop ends at the first minibatch whose influence is below ε. Ours, with `final_scale`, ends below ε on
images held out from its steps, however far its steps came.

On random weights ε is a tenth of the start's influence: the softmax over 1000 classes is nearly flat there, and the
published 0.03 would be met before the first update. The batch is an eighth of the step's, for the time it takes. On the
trained digits ViT ε is the published 0.03. Time says little without the noise that it bought: its norm and its
influence on images that neither loop saw, and its norm when scaled to ε there, stand in the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.baselines import published_synthesis
from benchmarks.common import Case, Variant, dtypes, ratio
from benchmarks.models import make_images, make_model, make_start, trained_digits
from fastnull.bench import BenchSettings, Row
from fastnull.encoder import FrozenEncoder
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.synthesis.batches import Pair
from fastnull.synthesis.universal import judge, scaled_to_eps

FRACTION, STEPS, BATCHES = 0.1, 40, 2
BANK = "fastnull, one bank"
"""All starts in one synthesis, as a bank of noises is made; the other variants take them one after the other."""
DIGITS_EPS, DIGITS_STEPS, DIGITS_BATCH, DIGITS_STARTS = 0.03, 400, 64, 3


@dataclass(frozen=True)
class Task:
    """A model, its images, starts and when a synthesis ends; `made` is filled with what each variant made."""

    name: str
    model: nn.Module
    batches: list[Tensor]
    """What steps are taken on."""
    check: Tensor
    """What our syntheses judge their noise on."""
    unseen: Tensor
    """What the summary judges all noise on."""
    starts: Tensor
    """[S, N, D]; one synthesis each, one after the other."""
    eps: float
    steps: int
    made: dict[tuple[str, torch.dtype], tuple[list[int], Tensor]] = field(default_factory=dict)
    """(backend, dtype) → updates of each synthesis, noises [S, N, D]."""


def cases(settings: BenchSettings) -> Iterator[Case]:
    """A synthesis for the last model, and for the trained digits ViT unless a look is all that is asked for."""
    for name in settings.models[-1:]:
        model = make_model(name, settings)
        B, starts = max(1, settings.batch // 8), _starts(model, settings, 1)
        *batches, check, unseen = [make_images(model, B, settings, key) for key in range(BATCHES + 2)]
        oracle, pairs = _oracle(model, batches)
        eps = FRACTION * min(float(judge(oracle, starts, [pair])) for pair in pairs)
        yield _case(Task(name, model, batches, check, unseen, starts, eps, STEPS), settings)
    if settings.trained:
        model, images = trained_digits(settings)
        *batches, check = images.split(DIGITS_BATCH)[:9]
        unseen, starts = images[9 * DIGITS_BATCH :], _starts(model, settings, DIGITS_STARTS)
        yield _case(
            Task("vit_digits, trained", model, batches, check, unseen, starts, DIGITS_EPS, DIGITS_STEPS), settings
        )


def _starts(model: nn.Module, settings: BenchSettings, count: int) -> Tensor:
    return torch.stack([make_start(model, replace(settings, seed=settings.seed + key)) for key in range(count)])


def _case(task: Task, settings: BenchSettings) -> Case:
    config = SynthesisConfig(eps=task.eps, limit=3.0, contrast=0.0, final_scale=True)  # the published start
    variants = []
    for dtype in dtypes(settings):
        encoder = FrozenEncoder(task.model, dtype=dtype)

        def published(index: int, dtype: torch.dtype = dtype) -> Tensor:
            ends = [published_synthesis(task.model, task.batches, s, dtype, task.eps, task.steps) for s in task.starts]
            noises = torch.stack([noise for noise, _ in ends])
            task.made["published", dtype] = [steps for _, steps in ends], noises
            return noises

        variants.append(Variant("published", dtype, published))

        def ours(index: int, encoder: FrozenEncoder = encoder, dtype: torch.dtype = dtype) -> Tensor:
            ends = [synthesize(encoder, task.batches, config, check=task.check, start=s[None]) for s in task.starts]
            noises = torch.cat([noise.tokens for noise in ends])
            task.made["fastnull", dtype] = [int(noise.steps) for noise in ends], noises
            return noises

        def bank(index: int, encoder: FrozenEncoder = encoder, dtype: torch.dtype = dtype) -> Tensor:
            together = replace(config, count=len(task.starts))
            noise = synthesize(encoder, task.batches, together, check=task.check, start=task.starts)
            task.made[BANK, dtype] = noise.steps.tolist(), noise.tokens
            return noise.tokens

        note = f"backend {encoder.backend}, products {str(encoder.products)[6:]}"
        variants.append(Variant("fastnull", dtype, ours, note=note))
        if len(task.starts) > 1:
            variants.append(Variant(BANK, dtype, bank, note=note))
    S, N, D = task.starts.shape
    sizes = f"batch {len(task.batches[0])}, {N} noisy tokens, width {D}, {S} noises"
    return Case(
        "synthesis", task.name, f"to ε = {task.eps:.3g}", sizes, variants, ("published", torch.float32),
        judge=_judge(task), summary=lambda rows: _summary(task, rows), rounds=1 if task.steps == STEPS else None,
    )  # fmt: skip


def _oracle(model: nn.Module, batches: Sequence[Tensor]) -> tuple[FrozenEncoder, list[Pair]]:
    """The unchanged model in float32 under autograd's code, with clean tokens and logits of the batches."""
    oracle = FrozenEncoder(model, dtype=torch.float32, backend="reference")
    return oracle, [(tokens, oracle(tokens)) for tokens in map(oracle.embed, batches)]


def _judge(task: Task) -> Callable[[Variant, Tensor], tuple[float | None, str]]:
    """Noise is right if its start did not meet ε on any minibatch, and it does on one."""
    oracle, pairs = _oracle(task.model, task.batches)

    def least_influence(noises: Tensor) -> list[float]:
        return torch.stack([judge(oracle, noises.float(), [pair]) for pair in pairs]).amin(0).tolist()

    before = least_influence(task.starts)

    def judged(variant: Variant, noises: Tensor) -> tuple[float | None, str]:
        if min(before) < task.eps:
            return None, "the start met ε already, so no synthesis was measured"
        # measured in another dtype than the loop's: a tenth of slack
        least = max(least_influence(noises))
        return None, "" if least < 1.1 * task.eps else f"influence {least:.3g} at the end, not below {task.eps:.3g}"

    return judged


def _summary(task: Task, rows: Sequence[Row]) -> list[str]:
    oracle, unseen = _oracle(task.model, [task.unseen])
    lines = []
    for (backend, dtype), (steps, noises) in task.made.items():
        kind, noises = str(dtype)[6:], noises.float()
        seen = judge(oracle, noises, unseen)
        scaled, _ = scaled_to_eps(oracle, noises, seen, unseen, task.eps, larger=True)
        line = f"{task.name} {backend} {kind}: {', '.join(map(str, steps))} updates; means: norm "
        line += f"{_norm(noises):.4g}, influence on unseen images {float(seen.mean()):.3g}; norm where that is ε: "
        line += f"{_norm(scaled):.4g}"
        speed = ratio(rows, ("published", "float32"), (backend, kind))
        lines.append(line if speed is None else f"{line}; {speed:.2f} x the speed of the published loop (float32)")
    return lines


def _norm(noises: Tensor) -> float:
    return float(noises.flatten(1).norm(dim=1).mean())
