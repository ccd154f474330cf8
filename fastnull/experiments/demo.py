"""The demo: seven ways of finetuning a small ViT on digits at equal compute, measured alike, with a report.

It is a comparison (`fastnull.experiments.compare`) of fixed methods, and pictures of the noise.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastnull.data.sources import digits
from fastnull.data.subset import even_subset
from fastnull.experiments.compare import run_methods, weights
from fastnull.experiments.settings import RECIPES, CompareSettings
from fastnull.experiments.workers import threads
from fastnull.finetune.config import FinetuneConfig
from fastnull.models import load_model
from fastnull.record import provenance, write_json
from fastnull.report import DEMO, write_report
from fastnull.report.illustrations import FILE as NOISE
from fastnull.report.illustrations import illustrate

METHODS = ("none", "random", "universal", "boundary-tokens", "boundary-pixels", "free", "adversarial")


@dataclass(frozen=True)
class DemoSettings(CompareSettings):
    """How much the demo does: CompareSettings with other defaults.

    Attributes:
        quick: the report says that the numbers are too few to rank methods.
    """

    methods: tuple[str, ...] = METHODS
    seeds: int = 3
    quick: bool = False

    @classmethod
    def quickly(cls) -> DemoSettings:
        """One seed, short training and fewer attacks: shows in about a minute that everything works."""
        return cls(
            seeds=1, start_epochs=20, budget=65, eps=(2, 4, 8), pgd_steps=5, severities=(1, 3, 5), quick=True
        )  # fmt: skip


def run_demo(
    out: str | os.PathLike[str],
    settings: DemoSettings | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
    progress: bool = True,
) -> Path:
    """Train the starts, finetune with every method, evaluate, and write the report.

    Args:
        out: folder of the demo; the report goes to its folder `report`.
        settings: see DemoSettings.
        overwrite, resume, jobs, progress: see fastnull.experiments.compare.run_methods.

    Returns:
        The path of report.html.

    Raises:
        ValueError: the folder holds a demo and neither overwrite nor resume is given, or one with other settings.
        ImportError: scikit-learn or matplotlib is missing.
        KeyboardInterrupt: on Ctrl-C, after the runs that were going have saved their state.
    """
    settings = settings or DemoSettings()
    folder = Path(out)
    started = time.perf_counter()
    run_methods(folder, settings, kind="demo", overwrite=overwrite, resume=resume, jobs=jobs, progress=progress)
    with threads(1):
        _illustrate(folder, settings, again=overwrite)
    model = load_model(weights(folder, settings.first_seed))
    about = {
        "settings": asdict(settings),
        "quick": settings.quick,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "command": f"fastnull demo{' --quick' if settings.quick else ''} --seeds {settings.seeds}",
        "seconds": time.perf_counter() - started,
        "jobs": jobs,
        "provenance": provenance(),
    }
    write_json(folder / DEMO, about)
    return write_report([folder], folder / "report", overwrite=True)


def _illustrate(folder: Path, settings: DemoSettings, *, again: bool) -> None:
    path = folder / NOISE
    config = FinetuneConfig.from_dict(dict(RECIPES["universal"])).synthesis()
    if config is None or (path.exists() and not again):
        return
    train, test = digits()
    images, labels = test.tensors
    if settings.images is not None:
        images = images[even_subset(labels, settings.images, 0)]
    model = load_model(weights(folder, settings.first_seed))
    config = replace(config, rounds=10)  # enough to come below ε: the pictures show one finished noise
    illustrate(model, train.tensors[0], images, config, settings.batch_size).save(path)
