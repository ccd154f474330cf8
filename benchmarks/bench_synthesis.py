"""A whole universal synthesis, from the random start to the first minibatch whose influence is below ε.

ε is a tenth of the start's influence: with random weights the softmax over 1000 classes is nearly flat, and the
published 0.03 would be met before the first update. The batch is a quarter of the step's, for the time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.baselines import LR, published_synthesis
from benchmarks.common import Case, Variant, dtypes, ratio
from benchmarks.models import make_images, make_model, make_start
from benchmarks.work import ViTShape
from fastnull.bench import BenchSettings, Row
from fastnull.encoder import FrozenEncoder
from fastnull.objective import influence
from fastnull.synthesis import SynthesisConfig, synthesize
from fastnull.vit import split

SHARE, STEPS, BATCHES = 0.1, 40, 2


def cases(settings: BenchSettings) -> Iterator[Case]:
    """A synthesis for every model."""
    for name in settings.models:
        yield _case(name, make_model(name, settings), settings)


def _case(name: str, model: nn.Module, settings: BenchSettings) -> Case:
    B = max(1, settings.batch // 4)
    batches = [make_images(model, B, settings, key) for key in range(BATCHES)]
    start = make_start(model, settings)
    measured = _influences(model, batches)
    eps = SHARE * min(measured(start))
    config = SynthesisConfig(
        eps=eps, lr=LR, weight_decay=0.0, schedule="constant", stop="batch", steps=STEPS, image_ratio=1.0
    )
    taken: dict[tuple[str, torch.dtype], int] = {}
    variants = []
    for dtype in dtypes(settings):
        encoder = FrozenEncoder(model, dtype=dtype)

        def ours(index: int, encoder: FrozenEncoder = encoder, dtype: torch.dtype = dtype) -> Tensor:
            noise = synthesize(encoder, batches, config, start=start.unsqueeze(0))
            taken["fastnull", dtype] = int(noise.steps[0])
            return noise.tokens[0]

        def published(index: int, dtype: torch.dtype = dtype) -> Tensor:
            noise, steps = published_synthesis(model, batches, start, dtype, eps, STEPS)
            taken["published", dtype] = steps
            return noise

        variants += [
            Variant("published", dtype, published),
            Variant("fastnull", dtype, ours, note=f"backend {encoder.backend}, products {str(encoder.products)[6:]}"),
        ]
    shape = ViTShape.of(split(model))
    sizes = f"batch {B}, {shape.N} tokens, width {shape.D}"
    return Case(
        "synthesis", name, "to a tenth of the start's influence", sizes, variants, ("published", torch.float32),
        judge=_judge(measured, eps, taken), summary=lambda rows: _summary(name, rows, taken),
    )  # fmt: skip


def _influences(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[Tensor], list[float]]:
    """noise [N, D] → its mean influence on each minibatch, by the unchanged model in float32 under autograd's code."""
    oracle = FrozenEncoder(model, dtype=torch.float32, backend="reference")
    pairs = [(tokens, oracle(tokens)) for tokens in map(oracle.embed, batches)]
    return lambda noise: [float(influence(clean, oracle(tokens + noise.float())).mean()) for tokens, clean in pairs]


def _judge(
    measured: Callable[[Tensor], list[float]], eps: float, taken: dict[tuple[str, torch.dtype], int]
) -> Callable[[Variant, Tensor], tuple[float | None, str]]:
    """A noise is right if it took updates and meets ε on a minibatch."""

    def judge(variant: Variant, noise: Tensor) -> tuple[float | None, str]:
        if not taken[variant.backend, variant.dtype]:
            return None, "the start met ε already, so no synthesis was measured"
        # measured in another dtype than the loop's: a tenth of slack
        least = min(measured(noise))
        return None, "" if least < 1.1 * eps else f"influence {least:.3g} after the last step, not below {eps:.3g}"

    return judge


def _summary(name: str, rows: Sequence[Row], taken: dict[tuple[str, torch.dtype], int]) -> list[str]:
    lines = [f"{name} {backend} {str(dtype)[6:]}: {steps} updates" for (backend, dtype), steps in taken.items()]
    for kind in dict.fromkeys(row.dtype for row in rows):
        speed = ratio(rows, ("published", "float32"), ("fastnull", kind))
        if speed is not None:
            lines.append(f"{name} {kind}: to ε {speed:.2f} x as fast as the published loop (float32)")
    return lines
