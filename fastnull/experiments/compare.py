"""A comparison: one model finetuned in several ways over several seeds at equal compute, all measured alike.

    fastnull compare --data digits --seeds 5 --out runs/digits

Everything goes through `finetune` and `evaluate`, as a run of one's own would. Every seed has its own pretrained model,
which all its methods start from. Each (seed, method) is a folder of its own; where it is finished it is not done again,
and where it was interrupted it goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnull.checks import check_choice, check_fields, check_number
from fastnull.data.sources import EMBEDDED, embedded, evaluation_data, hold_out
from fastnull.data.subset import even_subset
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.experiments.workers import one_thread, report_done, run_in_processes
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.loop import finetune
from fastnull.finetune.plan import make_plan
from fastnull.models import create_model, load_model
from fastnull.progress import progress_bar
from fastnull.record import provenance, read_json, replacing, write_json
from fastnull.report import write_report
from fastnull.report.comparison import format_comparison, summarize_runs
from fastnull.report.runs import METRICS, RESULTS, load_runs, read_metrics
from fastnull.rng import KeyedRandom
from fastnull.robustness import CORRUPTIONS, DEMO_CORRUPTIONS, corrupt, evaluate
from fastnull.robustness.corruptions import SEVERITIES
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.solvers import norms, valid_noise
from fastnull.synthesis.starts import draw_start

NORM_OF = "norm_of"
"""In a recipe of random noise: the method whose noise it equals in mean L2 norm, measured in the same seed's run, by a
common factor on its limits."""

RECIPES: dict[str, dict[str, Any]] = {
    # method → changes to the configuration that all share; settings from held-out splits, see docs/recipe.md
    "none": {"augment": "none"},
    "random": {"augment": "random"},
    "random-tokens": {"augment": "random", NORM_OF: "boundary-tokens"},
    "random-pixels": {"augment": "random", "site": "pixels", "noise_fraction": 0.5, NORM_OF: "boundary-pixels"},
    # the start of boundary-pixels, and no step
    "random-smooth": {
        "augment": "random", "site": "pixels", "noise_fraction": 0.5,
        "noise": {"limit": 8 / 255, "smooth_limit": 48 / 255, "contrast": 0.2}, NORM_OF: "boundary-pixels",
    },
    # a start of ±3, as published, or of ±1 stays far above ε on this model at what rounds may cost here
    "universal": {"augment": "universal", "noise": {"limit": 0.5, "lr": 0.1, "image_fraction": 1.0}},
    "per_image": {"augment": "per_image"},
    "boundary-tokens": {"augment": "boundary", "site": "patch", "noise": {"eps": 0.6}},
    # the default: one view, half of the images noisy
    "boundary-pixels": {"augment": "boundary"},
    # one step from a random start (Wong et al. 2020) for half of the images, each seen once: at equal compute that did
    # better than three steps, and than two views
    "adversarial": {
        "augment": "adversarial", "noise_fraction": 0.5, "attack_eps": 8 / 255, "attack_steps": 1,
        "attack_step_size": 8 / 255,
    },
    # β 1, as in the published comparison: within so few steps 6 ends in constant predictions
    "trades": {
        "augment": "trades", "attack_eps": 8 / 255, "attack_steps": 1, "attack_step_size": 8 / 255, "trades_beta": 1.0,
    },
}  # fmt: skip

RENAMED_METHODS = {"clean-only": "none", "per-image": "per_image"}
PRETRAINED = "pretrained"
FIXED = frozenset(
    {"model", "num_classes", "img_size", "pretrained", "checkpoint", "data", "data_dir", "download", "val_fraction"}
    | {"val_seed", "epochs", "compute_budget", "device", "shard", "seed", "label", "log", "progress"}
    | {"out", "overwrite", "resume", "force"}
)
"""Fields of FinetuneConfig that are no recipe's to set: all methods of a comparison have them alike, or it has them
itself."""
OWN_FILES = ("seed-*", "workers.log", "report/report.html", "report/report.md", "report/figures/*.png")
"""Patterns of what lies in the folder beside the settings."""
_NAME = re.compile(r"\w([\w .+=,()-]{0,78}[\w+)])?")
SPLITS = ("test", "held-out")
HELD_OUT = 0.2
"""Fraction of the training images that the split `held-out` keeps back."""
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and how much is done.

    Attributes:
        data: an embedded data set: digits or photos.
        methods: names in RECIPES or in `recipes`.
        recipes: further methods, name → fields of FinetuneConfig; random noise may have `norm_of`, see NORM_OF.
        seeds: how many; each has its own pretrained model and all methods.
        first_seed: the others follow it; settings are to be chosen on seeds that the final table does not use.
        split: test, or held-out: a fifth of the training images, kept out of training, to choose settings on.
        pretrain_epochs: of clean training from random weights.
        pretrain_lr: its highest learning rate.
        budget: of each finetuning, in forward passes for each training image; 156 are 52 clean epochs, or 34.7 of
            boundary noise in pixels by default.
        lr: highest learning rate of each finetuning.
        batch_size: of all training.
        eps: radii of the attacks in 1/255 of the pixel range.
        pgd_steps: of PGD.
        corruptions: names of fastnull.robustness.CORRUPTIONS.
        severities: of the corruptions.
        images: images that are evaluated, evenly from all classes; none: all.

    Raises:
        TypeError: a field of another type.
        ValueError: a value that is not allowed; a method that is unknown or could not be a folder's name; a recipe that
            is none, or sets what all methods have alike.
    """

    data: str = "digits"
    methods: tuple[str, ...] = tuple(RECIPES)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: int = 5
    first_seed: int = 0
    split: str = "test"
    pretrain_epochs: int = 40
    pretrain_lr: float = 2e-3
    budget: float = 156.0
    lr: float = 4e-3
    batch_size: int = 64
    eps: tuple[float, ...] = (1, 2, 4, 8)
    pgd_steps: int = 10
    corruptions: tuple[str, ...] = DEMO_CORRUPTIONS
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    images: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("data", self.data, EMBEDDED)
        check_choice("split", self.split, SPLITS)
        for name in ("seeds", "pretrain_epochs", "batch_size", "pgd_steps"):
            check_number(name, getattr(self, name), 1)
        check_number("first_seed", self.first_seed, 0)
        for name in ("pretrain_lr", "budget", "lr"):
            check_number(name, getattr(self, name), 0, exclusive=True)
        if self.images is not None:
            check_number("images", self.images, 1)
        for name in ("methods", "eps", "corruptions", "severities"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for radius in self.eps:
            check_number("eps", radius, 0, 255)
        for corruption in self.corruptions:
            check_choice("corruption", corruption, CORRUPTIONS)
        for severity in self.severities:
            check_number("severities", severity, SEVERITIES[0], SEVERITIES[-1])
        for name in (*self.recipes, *self.methods):
            _check_name(name)
        if len({name.lower() for name in self.methods}) < len(self.methods):
            raise ValueError(f"methods must differ; got {', '.join(self.methods)}")
        for method in dict.fromkeys((*self.recipes, *self.methods)):
            self.configuration(method)
        for method in self.methods:
            model = self.recipe(method).get(NORM_OF)
            if model is not None:
                self._check_model_of(method, model)

    def _check_model_of(self, method: str, model: Any) -> None:
        """Raise ValueError where `model` has no norm to give: one that runs, adds noise and waits for no other one."""
        if model not in self.methods:
            raise ValueError(f"method {method} takes the norm of {model}, which must be among the methods too")
        if NORM_OF in self.recipe(model) or self.configuration(model).augment == "none":
            why = "takes another one's itself" if NORM_OF in self.recipe(model) else "adds no noise"
            raise ValueError(f"recipe of {method}: {NORM_OF} must name a method with a norm of its own; {model} {why}")

    def recipe(self, method: str) -> Mapping[str, Any]:
        """The changes that make a method. Raises ValueError for an unknown one."""
        known = {**RECIPES, **self.recipes}
        if method in RENAMED_METHODS and method not in known:
            raise ValueError(f"method {method} is called {RENAMED_METHODS[method]} since version 0.2")
        return known[check_choice("method", method, known)]

    def configuration(self, method: str, **common: Any) -> FinetuneConfig:
        """A method's configuration over `common` fields. Raises ValueError, TypeError for a recipe that is none."""
        recipe = self.recipe(method)
        for name in recipe:
            if name in FIXED:
                raise ValueError(
                    f"recipe of {method}: {name} is not for a recipe: all methods of a comparison have it alike"
                )
        changes = {name: value for name, value in recipe.items() if name != NORM_OF}
        try:
            config = FinetuneConfig.from_dict({**common, **changes})
        except (TypeError, ValueError) as error:
            raise type(error)(f"recipe of {method}: {error}") from error
        if NORM_OF in recipe and config.augment != "random":
            raise ValueError(f"recipe of {method}: {NORM_OF} scales the limits of random noise, and nothing else")
        return config

    @property
    def seed_list(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


def run_compare(
    out: str | os.PathLike[str],
    settings: CompareSettings | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Pretrain, finetune with every method, evaluate, and put the numbers together.

    Args:
        out: folder; gets comparison.json, comparison.md and a report with plots beside the folders of the runs.
        settings: see CompareSettings.
        overwrite, resume, jobs, progress: see run_methods.

    Returns:
        What comparison.json holds: settings, a record a method (see report.comparison.summarize_runs), paired
        differences with 95 % confidence intervals, and provenance.

    Raises:
        ValueError: the folder holds a comparison and neither overwrite nor resume is given, or one with other settings.
        ImportError: scikit-learn, scikit-image or matplotlib is missing.
        KeyboardInterrupt: on Ctrl-C, after the runs that were going have saved their state.
    """
    settings = settings or CompareSettings()
    folder = Path(out)
    started = time.perf_counter()
    run_methods(
        folder,
        settings,
        kind="comparison",
        overwrite=overwrite,
        resume=resume,
        jobs=jobs,
        progress=progress,
        label=True,
    )
    # what is read back, and not what this process did: a resumed comparison is as whole as any other
    runs = load_runs([_place(folder, seed, method) for method in settings.methods for seed in settings.seed_list])
    record = {
        "settings": asdict(settings),
        **summarize_runs(runs, settings.methods),
        "seconds": time.perf_counter() - started,
        "jobs": jobs,
        "provenance": provenance(),
    }
    write_json(folder / "comparison.json", record)
    with replacing(folder / "comparison.md") as beside:
        beside.write_text(format_comparison(record), encoding="utf-8")
    write_report([folder], folder / "report", overwrite=True)
    return record


def run_methods(
    folder: Path,
    settings: CompareSettings,
    *,
    kind: str,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
    progress: bool = True,
    label: bool = False,
) -> None:
    """Do every run that is not done yet, each in folder/seed-S/METHOD.

    Args:
        folder: gets `kind`.json with the settings.
        settings: see CompareSettings.
        kind: what the whole is called in files and messages.
        overwrite: start over in a folder that holds one.
        resume: go on in it; what is finished is not done again.
        jobs: processes. Each computes with one thread, so the numbers do not depend on it. With more than one, a script
            that calls this needs the usual `if __name__ == "__main__"`.
        progress: show a progress bar and a line for each finished run.
        label: reports call the runs by the names of their methods.

    Raises: as run_compare.
    """
    check_number("jobs", jobs, 1)
    _check_extras(settings, kind)
    tasks = list(_tasks(folder, settings, label))
    _check_tasks(settings, tasks)
    _prepare(folder, settings, kind, overwrite, resume)
    total = len(tasks)
    with one_thread(), progress_bar(total, show=progress, unit=" run", desc=kind) as bar:
        if jobs == 1:
            for task in tasks:
                bar.set_description(task.name)
                report_done(bar, work(task))
        else:
            run_in_processes(work, tasks, jobs, folder / "workers.log", bar)


def weights(folder: Path, seed: int) -> Path:
    """Where a seed's pretrained model lies."""
    return _place(folder, seed, PRETRAINED) / "last.safetensors"


@dataclass(frozen=True)
class Task:
    """A finetuning (or the pretraining, which no `method` names) and its evaluation.

    Attributes:
        after: folder of the run that must be finished before; None can start at once.
        norm_of: that run's noise gives the norm of this one's.
        split, evaluation: what is evaluated, and further arguments of `evaluate`.
    """

    seed: int
    method: str | None
    config: FinetuneConfig
    after: Path | None
    norm_of: bool
    split: str
    evaluation: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.method or PRETRAINED}"

    @property
    def folder(self) -> Path:
        return Path(self.config.out or "")


def _check_extras(settings: CompareSettings, kind: str) -> None:
    """Before any work is done: what the data and the report need."""
    data = {"digits": ("scikit-learn", "sklearn"), "photos": ("scikit-image", "skimage")}[settings.data]
    report = (("matplotlib", "matplotlib"), ("markdown-it-py", "markdown_it"), ("scipy", "scipy"))
    for package, module in (data, *report):
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(f"the {kind} needs {package}: pip install fastnull[demo] ({error})") from error


def _check_name(name: str) -> None:
    """Raise ValueError for a method's name that cannot be a folder's in the comparison, everywhere and in tables."""
    if not _NAME.fullmatch(name) or name.lower() == PRETRAINED:
        raise ValueError(
            f"a method's name is a folder's too: it must begin with a letter or digit, hold only letters, digits, "
            f"spaces and . _ - + = , ( ), not end in a dot, and not be {PRETRAINED!r}; got {name!r}"
        )


def _check_tasks(settings: CompareSettings, tasks: Sequence[Task]) -> None:
    """Raise ValueError for what would else stop the runs after the first training: budgets and corruptions.

    Seeds differ in nothing that counts here.
    """
    of_one_seed = [task for task in tasks if task.seed == settings.first_seed]
    model = create_model(EMBEDDED[settings.data].model)
    train = embedded(settings.data, model)[0]
    config = of_one_seed[0].config
    kept = hold_out(train, config.val_fraction, config.val_seed)[0]
    for task in of_one_seed:
        try:
            make_plan(task.config, len(kept))
        except ValueError as error:
            text = str(error).replace("compute_budget", "budget")
            raise ValueError(f"{task.method or PRETRAINED}: {text}") from error
    image = train[0][0].unsqueeze(0)
    for corruption in settings.corruptions:
        for severity in settings.severities:
            try:
                corrupt(image, corruption, severity)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"corruption {corruption} does not take these images: {error}") from error


def _prepare(folder: Path, settings: CompareSettings, kind: str, overwrite: bool, resume: bool) -> None:
    """Make the folder ready and write the settings; raise where something is in the way.

    Runs are in the way once one of them is finished. Before that the settings may change: what was begun under others
    is removed, and what was begun under the same ones goes on.
    """
    if overwrite and resume:
        raise ValueError("give either resume or overwrite, not both")
    path = folder / f"{kind}.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder; {folder} is a file")
    held = path.exists()
    if not held and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {kind}: give another folder")
    changed: list[str] = []
    if held and not overwrite:
        finished = any(folder.glob(f"seed-*/*/{RESULTS}"))
        if finished and not resume:
            raise ValueError(
                f"{folder} holds a {kind} already: resume=True goes on with it, overwrite=True starts over"
            )
        before = _settings_in(path, kind)
        now = json.loads(json.dumps(asdict(settings)))  # tuples become lists, as in the file
        changed = [entry.name for entry in fields(settings) if before.get(entry.name) != now[entry.name]]
        if finished and changed:
            raise ValueError(f"cannot resume the {kind} in {folder} with other settings: {', '.join(changed)}")
    if held and (overwrite or changed):
        for found in folder.glob("seed-*"):
            shutil.rmtree(found)
    write_json(path, {"settings": asdict(settings)})


def _settings_in(path: Path, kind: str) -> dict[str, Any]:
    settings = read_json(path).get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no record of a {kind}: it holds no settings; overwrite=True starts over")
    return settings


def _tasks(folder: Path, settings: CompareSettings, label: bool) -> Iterator[Task]:
    """Every run, after those that it needs."""
    common: dict[str, Any] = {
        "model": EMBEDDED[settings.data].model, "data": settings.data, "batch_size": settings.batch_size,
        "val_fraction": HELD_OUT if settings.split == "held-out" else 0.0, "device": "cpu", "resume": True,
        "progress": False,
    }  # fmt: skip
    evaluation = {
        "eps": [radius / 255 for radius in settings.eps],
        "steps": settings.pgd_steps,
        "corruptions": settings.corruptions,
        "severities": settings.severities,
        "limit": settings.images,
    }
    # a noise that gives another its norm goes first
    methods = sorted(settings.methods, key=lambda method: NORM_OF in settings.recipe(method))
    for seed in settings.seed_list:
        first = _place(folder, seed, PRETRAINED)
        pretraining = FinetuneConfig(
            **common, augment="none", epochs=settings.pretrain_epochs, lr=settings.pretrain_lr, seed=seed,
            warmup_epochs=0.3 * settings.pretrain_epochs, out=str(first),
        )  # fmt: skip
        yield Task(seed, None, pretraining, None, False, settings.split, evaluation)
        for method in methods:
            config = settings.configuration(
                method, **common, compute_budget=settings.budget, lr=settings.lr, warmup_epochs=2, seed=seed,
                checkpoint=str(weights(folder, seed)), out=str(_place(folder, seed, method)),
                label=method if label else None,
            )  # fmt: skip
            norm_of = settings.recipe(method).get(NORM_OF)
            after = first if norm_of is None else _place(folder, seed, norm_of)
            yield Task(seed, method, config, after, norm_of is not None, settings.split, evaluation)


def _place(folder: Path, seed: int, name: str) -> Path:
    return folder / f"seed-{seed}" / name


def work(task: Task) -> str:
    """Finetune and evaluate; returns the line that says what came out."""
    config = task.config
    if task.norm_of and task.after is not None:
        config = _equal_norm(config, task.after)
    with warnings.catch_warnings():
        # that a universal noise did not meet ε: the report shows the influence that it had
        warnings.filterwarnings("ignore", message="the universal noise")
        result = finetune(config)
    line = f"{task.name}: {result.plan.steps} steps, {result.seconds['total']:.0f} s"
    if task.method is None:
        return line
    found = evaluate(
        result.model,
        _evaluation_data(config, task.split, result.model),
        **task.evaluation,
        out=task.folder / RESULTS,
        progress=False,
    )
    summary = found["summary"]
    return (
        f"{line}; clean {summary['clean']:.1f} %, under attack {summary['adversarial_mean']:.1f} %, "
        f"corrupted {summary['corruption_mean']:.1f} %"
    )


def _evaluation_data(config: FinetuneConfig, split: str, model: nn.Module) -> Dataset[Any]:
    if split == "test":
        return evaluation_data(config.data, model)
    held = hold_out(embedded(config.data, model)[0], config.val_fraction, config.val_seed)[1]
    assert held is not None
    return held


def _equal_norm(config: FinetuneConfig, other: Path) -> FinetuneConfig:
    """Random noise with its limits scaled to the mean norm that the noise of another run had over its steps."""
    records = read_metrics(other / METRICS)
    seen = [record["norm"] for record in records if record.get("kind") == "step" and "norm" in record]
    if not seen:
        raise ValueError(f"{other} logged no norm of its noise: it cannot be the model of random noise")
    model = load_model(config.checkpoint or "").eval()
    images, labels = embedded(config.data, model)[0].tensors
    images = images[even_subset(labels, CALIBRATION_IMAGES, 0)]
    inputs = FrozenEncoder(model, site=config.site).embed(images)
    start = config.synthesis()
    assert start is not None
    scale = scale_of_norm(statistics.fmean(seen), inputs, start)
    return replace(config, noise=replace(start, limit=scale * start.limit, smooth_limit=scale * start.smooth_limit))


def scale_of_norm(norm: float, inputs: Tensor, start: SynthesisConfig) -> float:
    """The factor on the limits of a start at which the noise on `inputs` has the mean L2 norm `norm`.

    In pixels noise is cut to [0, 1], which takes more of it on dark and bright pixels, so the factor is searched for.

    Args:
        norm: in units of the site.
        inputs: what the noise is added to, [B, ...].
        start: its site and limits are used.

    Raises:
        ValueError: no noise of this kind in pixels is as long.
    """
    source = KeyedRandom(0, "scale", torch.arange(len(inputs), device=inputs.device))
    noise = draw_start(inputs, start, source).noise
    low = norm / float(norms(noise).mean())
    if start.site != "pixels":
        return low
    high = 1 / max(start.limit, start.smooth_limit)
    if float(norms(valid_noise(inputs, high * noise)).mean()) < norm:
        raise ValueError(f"no such noise in pixels has a mean norm of {norm:g}")
    for _ in range(30):
        middle = (low + high) / 2
        short = float(norms(valid_noise(inputs, middle * noise)).mean()) < norm
        low, high = (middle, high) if short else (low, middle)
    return low
