"""A whole universal synthesis, from the random start to the first minibatch whose influence is below ε.

On random weights ε is a tenth of the start's influence: the softmax over 1000 classes is nearly flat there, and the
published 0.03 would be met before the first update. The batch is an eighth of the step's, for the time it takes. On the
trained digits ViT ε is the published 0.03. Time says little without the noise that it bought: its norm and its
influence on held-out images, scaled to the same ε there, stand in the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.baselines import LR, published_synthesis
from benchmarks.common import Case, Variant, dtypes, ratio
from benchmarks.models import make_images, make_model, make_start, trained_digits
from fastnull.batches import Pair
from fastnull.bench import BenchSettings, Row
from fastnull.encoder import FrozenEncoder
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.universal import judge, scaled_to_eps

SHARE, STEPS, BATCHES = 0.1, 40, 2
DIGITS_EPS, DIGITS_STEPS, DIGITS_BATCH = 0.03, 400, 64


@dataclass(frozen=True)
class Task:
    """A model, its minibatches, and when a synthesis ends; `made` is filled with what each variant made."""

    name: str
    model: nn.Module
    batches: list[Tensor]
    held_out: Tensor
    start: Tensor
    eps: float
    steps: int
    made: dict[tuple[str, torch.dtype], tuple[int, Tensor]] = field(default_factory=dict)
    """(backend, dtype) → updates, noise [N, D]."""


def cases(settings: BenchSettings) -> Iterator[Case]:
    """A synthesis for the last model, and for the trained digits ViT unless a look is all that is asked for."""
    for name in settings.models[-1:]:
        model = make_model(name, settings)
        B, start = max(1, settings.batch // 8), make_start(model, settings)
        *batches, held_out = [make_images(model, B, settings, key) for key in range(BATCHES + 1)]
        oracle, pairs = _oracle(model, batches)
        eps = SHARE * min(float(judge(oracle, start, [pair])) for pair in pairs)
        yield _case(Task(name, model, batches, held_out, start, eps, STEPS), settings)
    if settings.trained:
        model, images = trained_digits(settings)
        *batches, held_out = images.split(DIGITS_BATCH)[:9]
        start = make_start(model, settings)
        yield _case(Task("vit_digits, trained", model, batches, held_out, start, DIGITS_EPS, DIGITS_STEPS), settings)


def _case(task: Task, settings: BenchSettings) -> Case:
    config = SynthesisConfig(
        eps=task.eps, lr=LR, weight_decay=0.0, schedule="constant", stop="batch", steps=task.steps, image_ratio=1.0
    )
    variants = []
    for dtype in dtypes(settings):
        encoder = FrozenEncoder(task.model, dtype=dtype)

        def published(index: int, dtype: torch.dtype = dtype) -> Tensor:
            noise, steps = published_synthesis(task.model, task.batches, task.start, dtype, task.eps, task.steps)
            task.made["published", dtype] = steps, noise
            return noise

        variants.append(Variant("published", dtype, published))

        def ours(index: int, encoder: FrozenEncoder = encoder, dtype: torch.dtype = dtype) -> Tensor:
            noise = synthesize(encoder, task.batches, config, start=task.start.unsqueeze(0))
            task.made["fastnull", dtype] = int(noise.steps[0]), noise.tokens[0]
            return noise.tokens[0]

        note = f"backend {encoder.backend}, products {str(encoder.products)[6:]}"
        variants.append(Variant("fastnull", dtype, ours, note=note))
    N, D = task.start.shape
    sizes = f"batch {len(task.batches[0])}, {N} noisy tokens, width {D}"
    return Case(
        "synthesis", task.name, f"to ε = {task.eps:.3g}", sizes, variants, ("published", torch.float32),
        judge=_judge(task), summary=lambda rows: _summary(task, rows), rounds=1 if task.steps == STEPS else None,
    )  # fmt: skip


def _oracle(model: nn.Module, batches: Sequence[Tensor]) -> tuple[FrozenEncoder, list[Pair]]:
    """The unchanged model in float32 under autograd's code, with clean tokens and logits of the batches."""
    oracle = FrozenEncoder(model, dtype=torch.float32, backend="reference")
    return oracle, [(tokens, oracle(tokens)) for tokens in map(oracle.embed, batches)]


def _judge(task: Task) -> Callable[[Variant, Tensor], tuple[float | None, str]]:
    """A noise is right if it took updates and meets ε on a minibatch."""
    oracle, pairs = _oracle(task.model, task.batches)

    def judged(variant: Variant, noise: Tensor) -> tuple[float | None, str]:
        if not task.made[variant.backend, variant.dtype][0]:
            return None, "the start met ε already, so no synthesis was measured"
        # measured in another dtype than the loop's: a tenth of slack
        least = min(float(judge(oracle, noise.float(), [pair])) for pair in pairs)
        return None, "" if least < 1.1 * task.eps else f"influence {least:.3g} at the end, not below {task.eps:.3g}"

    return judged


def _summary(task: Task, rows: Sequence[Row]) -> list[str]:
    oracle, held_out = _oracle(task.model, [task.held_out])
    lines = []
    for (backend, dtype), (steps, noise) in task.made.items():
        kind = str(dtype)[6:]
        seen = float(judge(oracle, noise.float(), held_out))
        at_eps = scaled_to_eps(oracle, noise.float(), held_out, task.eps, larger=True).norm()
        line = f"{task.name} {backend} {kind}: {steps} updates, norm {float(noise.norm()):.4g}, influence on held-out "
        line += f"images {seen:.3g}; norm where that is ε: {float(at_eps):.4g}"
        speed = ratio(rows, ("published", "float32"), (backend, kind))
        lines.append(line if speed is None else f"{line}; {speed:.2f} x the speed of the published loop (float32)")
    return lines
