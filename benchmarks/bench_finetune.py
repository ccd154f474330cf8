"""A finetuning step with each augmentation, optimiser included, against one with two clean views.

The last of the models alone, at a quarter of the batch, for the time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.baselines import TwoCleanViews
from benchmarks.common import Case, Variant, dtypes
from benchmarks.models import make_images, make_model
from benchmarks.work import ViTShape
from fastnull.augment import NullspaceAugment
from fastnull.bench import BenchSettings, Row
from fastnull.distributed import Processes
from fastnull.encoder import FrozenEncoder
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.plan import make_plan
from fastnull.finetune.training import Training
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.starts import draw_start, step_source
from fastnull.vit import split

STEPS = 3
"""Updates of boundary and per-image noise, and of the attack, in a training step."""
TWO_VIEWS, ORACLE, SYNC = "two clean views", "boundary by autograd", "encoder.sync"
COSINE = {torch.float32: 0.999, torch.bfloat16: 0.95, torch.float16: 0.95}
"""Least cosine between our boundary noise's movement and autograd's: an image at ε may step the other way."""
AUGMENTS = (
    # label, augmentation, site, backend of its encoder
    ("none", "none", "patch", "auto"),
    ("random", "random", "patch", "auto"),
    ("universal", "universal", "patch", "auto"),
    ("per_image", "per_image", "patch", "auto"),
    ("boundary", "boundary", "patch", "auto"),
    ("boundary, pixels", "boundary", "pixels", "auto"),
    (ORACLE, "boundary", "patch", "reference"),
    ("adversarial", "adversarial", "patch", "auto"),
)
SYNTHESISED = ("boundary", "per_image", "universal")


def cases(settings: BenchSettings) -> Iterator[Case]:
    """A step for every dtype; bfloat16 is autocast, as in training."""
    for name in settings.models[-1:]:
        for dtype in dtypes(settings):
            yield _case(name, make_model(name, settings), dtype, settings)


def _case(name: str, model: nn.Module, dtype: torch.dtype, settings: BenchSettings) -> Case:
    B, shape = max(2, settings.batch // 4), ViTShape.of(split(model))
    images = make_images(model, B, settings)
    labels = torch.arange(B) % shape.C
    variants = []
    for label, augment, site, backend in ((TWO_VIEWS, "none", "patch", "auto"), *AUGMENTS):
        noise = None
        if augment in SYNTHESISED:
            noise = SynthesisConfig(mode=augment, site=site, steps=STEPS, dtype=str(dtype)[6:])
        config = FinetuneConfig(
            augment=augment, site=site, backend=backend, batch_size=B, epochs=1000, progress=False,
            amp=None if dtype == torch.float32 else str(dtype)[6:], attack_steps=STEPS, seed=settings.seed,
            noise_fraction=0.0,  # two views, whatever the augmentation
            noise=noise,
        )  # fmt: skip
        variants.append(_variant(label, config, name, images, labels, dtype, settings))
    variants.append(_sync(name, dtype, images, settings))
    return Case(
        "finetune", name, f"step, noise of {STEPS} updates", f"batch {B}, {shape.N} tokens, width {shape.D}", variants,
        (TWO_VIEWS, dtype), judge=_judge(), summary=lambda rows: _summary(name, rows), rounds=2,
    )  # fmt: skip


def _variant(
    label: str, config: FinetuneConfig, name: str, images: Tensor, labels: Tensor, dtype: torch.dtype,
    settings: BenchSettings,
) -> Variant:  # fmt: skip
    model = make_model(name, settings).train().requires_grad_(True)
    processes, classes = Processes(), split(model).num_classes
    training = Training(config, model, make_plan(config, len(images)), classes, images.device, processes)
    if label == TWO_VIEWS:
        training.augment = TwoCleanViews(model)  # type: ignore[assignment]
    if config.augment == "universal":
        training.augment.refresh([images])
    host = images.cpu()

    def check() -> Tensor:
        moved = _moved(training, images)
        training.train_step(host, labels)
        loss = torch.tensor([training.step_record()["loss"]])
        return loss if moved is None else torch.cat([loss.double(), moved.double().flatten().cpu()])

    return Variant(label, dtype, lambda index: training.train_step(host, labels), check=check, library=label == ORACLE)


def _sync(name: str, dtype: torch.dtype, images: Tensor, settings: BenchSettings) -> Variant:
    """Taking over the weights, which every draw of a boundary step begins with."""
    encoder = FrozenEncoder(make_model(name, settings), dtype=dtype)

    def check() -> Tensor:
        encoder.sync()
        return encoder(encoder.embed(images)).sum().reshape(1)

    return Variant(SYNC, dtype, lambda index: encoder.sync(), check=check)


@torch.no_grad()
def _moved(training: Training, images: Tensor) -> Tensor | None:
    """How far the synthesis moves its random start, which alone would hide a wrong gradient; None where none does."""
    augment = training.augment
    if training.config.augment not in ("boundary", "per_image") or training.config.site != "patch":
        return None
    assert isinstance(augment, NullspaceAugment)
    tokens = augment.encoder.embed(images)
    augment.step = 0
    source = step_source(augment.config.seed, 0, torch.arange(len(tokens), device=tokens.device))
    start = draw_start(tokens, augment.config, source).noise
    return augment.draw(tokens).float() - start.float()


def _judge() -> Callable[[Variant, Tensor], tuple[float | None, str]]:
    """Every loss is finite, and boundary noise moves as it does by autograd (which is judged first)."""
    oracle: list[Tensor] = []

    def judge(variant: Variant, result: Tensor) -> tuple[float | None, str]:
        if not bool(torch.isfinite(result).all()):
            return None, "the loss or the noise is not finite"
        if variant.backend == ORACLE:
            oracle.append(result[1:])
        elif variant.backend == "boundary":
            cosine = float(torch.nn.functional.cosine_similarity(result[1:], oracle[0], dim=0))
            if cosine < COSINE[variant.dtype]:
                return None, f"the noise moves with cosine {cosine:.3f} to autograd's"
        return None, ""

    return judge


def _summary(name: str, rows: Sequence[Row]) -> list[str]:
    times = {row.backend: row.ms_p50 for row in rows}
    base = times.get(TWO_VIEWS)
    if not base:
        return []
    costs = [f"{label} {ms / base:.2f}" for label, ms in times.items() if ms and label not in (TWO_VIEWS, SYNC)]
    lines = [f"{name} {rows[0].dtype}: a step costs, in steps of two clean views: {', '.join(costs)}"]
    sync, step = times.get(SYNC), times.get("boundary")
    if sync and step:
        lines.append(f"{name} {rows[0].dtype}: taking over the weights is {100 * sync / step:.1f} % of a boundary step")
    return lines
