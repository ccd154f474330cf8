"""Estimates the time of a comparison on this machine from a few steps of each method and a few images of each suite."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import default_collate

from fastnull.data.image_files import to_pixels
from fastnull.data.sources import EpochBatches, loader
from fastnull.distributed.processes import Processes
from fastnull.experiments.compare import thread_count
from fastnull.experiments.settings import COSTLY, START, CompareSettings
from fastnull.experiments.tasks import (
    FOLDER_IMAGES,
    Inputs,
    Quiet,
    Task,
    evaluation_set,
    images_of,
    numbers_of,
    plan_tasks,
)
from fastnull.experiments.workers import threads
from fastnull.finetune.dry_run import described
from fastnull.finetune.plan import views_of
from fastnull.finetune.prepare import Data, Prepared
from fastnull.finetune.training import Training
from fastnull.noise import Noise
from fastnull.progress import progress_bar
from fastnull.record import device_name
from fastnull.rng import preserved
from fastnull.robustness import evaluate
from fastnull.robustness.settings import EvaluationSettings
from fastnull.robustness.suites import FOLDER_SUITES

TIMED_STEPS, TIMED_IMAGES, COSTLY_IMAGES = 2, 16, 2
"""Timed steps per method (after one warm-up step), and timed images per suite and per suite in COSTLY."""
STILL = 1e-12
"""Learning rate of the timed steps, so small that all methods are timed on the same model."""


class Row(NamedTuple):
    """Row of a table: name, number of steps or images, seconds for one, images per second, total seconds."""

    name: str
    number: int
    one: float
    speed: float
    total: float


def dry_run(
    settings: CompareSettings,
    *,
    model: Callable[[], nn.Module] | None = None,
    train_data: Data | None = None,
    test_data: Data | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> str:
    """Text with the memory, and the time of each method, each suite and the whole comparison. Writes no files.

    Raises: the errors that run_compare raises before its first step.
    """
    inputs = Inputs(model, train_data, test_data)
    tasks, about, ready = plan_tasks(Path(), settings, inputs)
    tasks = [task for task in tasks if task.seed == settings.first_seed]
    suites = [(each, suite) for each in settings.evaluations() for suite in each.suites]
    with (
        Quiet(),
        preserved(),
        threads(thread_count(settings, jobs)),
        progress_bar(len(tasks) + len(suites), show=progress, desc="timing", unit=" part") as bar,
    ):
        trained = []
        for task in tasks:
            if task.plan is not None:
                step, refresh = _seconds(task, ready)
                seconds = task.plan.steps * step + task.plan.epochs * refresh
                trained.append(Row(task.method or START, task.plan.steps, step, task.plan.batch_size / step, seconds))
            bar.update()
        measured = []
        for each, suite in suites:
            count = images_of(suite, each, about["test"]) * numbers_of(suite, each)
            image = _seconds_per_image(tasks[-1], each, suite, ready)
            measured.append(Row(suite, count, image, 1 / image, count * image))
            bar.update()
        largest = max((task for task in tasks if task.plan is not None), key=lambda task: views_of(task.config))
        config = replace(largest.config, checkpoint=settings.checkpoint, pretrained=settings.pretrained)
        lines = [f"one run     {largest.name}", described(config, ready, Processes()).rstrip("\n")]
    lines += _table("training", "steps", "s / step", trained) + _table("evaluation", "images", "s / image", measured)
    of_a_seed = sum(row.total for row in trained) + len(settings.methods) * sum(row.total for row in measured)
    total = settings.seeds * of_a_seed
    several = f"; at best {duration(total / jobs)} with {jobs} processes" if jobs > 1 else ""
    lines += [
        "",
        f"whole       {duration(total)}: {settings.seeds} x {duration(of_a_seed)} for a seed{several}",
        f"measured    {TIMED_STEPS} steps, {TIMED_IMAGES} images; {device_name(settings.where)}",
    ]
    if any(suite in FOLDER_SUITES for _, suite in suites):
        lines.append(f"assumed     {FOLDER_IMAGES:,} images in each part of a published test set")
    return "\n".join(lines) + "\n"


def _table(title: str, what: str, one: str, rows: Sequence[Row]) -> list[str]:
    head = f"{title:<24}{what:>9}{one:>12}{'images / s':>12}{'time':>10}"
    return ["", head] + [
        f"{row.name:<24}{row.number:>9}{row.one:>12.3g}{row.speed:>12.3g}{duration(row.total):>10}" for row in rows
    ]


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _seconds(task: Task, ready: Prepared) -> tuple[float, float]:
    """Seconds per training step with loading, and per update of a universal noise bank (0 for other methods)."""
    assert task.plan is not None
    config, device = replace(task.config, lr=STILL, min_lr=0.0), torch.device(task.settings.where)
    synthesis = config.synthesis()
    if config.augment == "universal" and synthesis is not None:
        config = replace(config, noise=replace(synthesis, steps=TIMED_STEPS))
    training = Training(config, ready.model, task.plan, ready.num_classes, device, Processes())
    ready.model.train()
    count = min(TIMED_STEPS + 1, task.plan.steps_per_epoch)  # the first is a warm-up
    order = EpochBatches(len(ready.train), task.plan.batch_size, count, config.seed)
    batches = iter(loader(ready.train, order, workers=config.workers, device=device))
    refresh = 0.0
    if config.augment == "universal":
        images, _ = next(iter(loader(ready.train, order, device=device)))
        pixels = to_pixels(images, device)
        elapsed = _timed(lambda: training.refresh([pixels], [pixels]), device)
        refresh = elapsed * task.plan.refresh_cost / (3 * TIMED_STEPS * task.plan.batch_size)
    times = [_timed(lambda: training.train_step(*next(batches)), device) for _ in range(count)]
    return min(times[1:] or times), refresh


def _seconds_per_image(task: Task, settings: EvaluationSettings, suite: str, ready: Prepared) -> float:
    """Seconds per image for one measurement of a suite, with loading."""
    data = evaluation_set(task.settings, task.config, task.inputs, ready.model)
    indices = range(min(COSTLY_IMAGES if suite in COSTLY else TIMED_IMAGES, len(data)))  # type: ignore[arg-type]
    found: list[Any] = []
    device = torch.device(task.settings.where)
    loading = _timed(lambda: found.extend(data[index] for index in indices), device)
    images, labels = default_collate(found)
    noise = None if task.settings.noise is None else Noise.load(task.settings.noise)
    # an image of a published set costs as much as a clean one
    timed = "clean" if suite in FOLDER_SUITES else suite
    # misclassified images are not attacked, so time attacks with all steps on all images: the upper bound
    settings = replace(
        settings, eps=settings.eps[:1], limit=None, severities=settings.severities[:1], final_iterate=True
    )

    def seconds(name: str, given: Any) -> float:
        alone = replace(settings, suites=(name,))
        return _timed(lambda: evaluate(ready.model, given, alone, noise=noise), device)

    overhead = seconds("clean", (images[:1], labels[:1]))  # e.g. digests of the weights
    given: Any = (images, labels)
    if timed == "corruptions" and settings.corruption_size is not None:  # it loads the files itself
        settings, given, loading = replace(settings, limit=len(indices)), data, 0.0
    measuring = max(0.0, seconds(timed, given) - overhead) / numbers_of(timed, settings)
    return (loading + measuring) / len(indices)


def _timed(do: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
