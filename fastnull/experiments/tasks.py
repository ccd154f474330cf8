"""The runs of a comparison: for each seed a start, then the finetuning and the evaluation of each method.

`plan_tasks` opens the data, makes the model once, checks all settings so that no run fails after hours, and returns the
tasks. `work` runs one of them.
"""

from __future__ import annotations

import hashlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from fastnull.checks import check_device, check_images
from fastnull.data.digest import cheap_digest
from fastnull.data.image_files import to_pixels
from fastnull.data.sources import EMBEDDED, Samples, evaluation_data, keyed
from fastnull.data.subset import even_subset, labels_of
from fastnull.data.view import View
from fastnull.distributed.processes import Processes
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.experiments.settings import NORM_OF, START, CompareSettings
from fastnull.finetune.checkpoint import network_of
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.loop import finetune
from fastnull.finetune.plan import Plan, make_plan
from fastnull.finetune.prepare import Data, Prepared, cache_of, check_start, head_is_trained, prepare
from fastnull.finetune.training import Training
from fastnull.noise import Noise
from fastnull.progress import listening
from fastnull.record import write_json
from fastnull.report.runs import METRICS, RESULTS, read_metrics
from fastnull.rng import KeyedRandom, preserved
from fastnull.robustness import evaluate
from fastnull.robustness.measurements import CW
from fastnull.robustness.settings import BALL_ATTACKS, EvaluationSettings
from fastnull.robustness.suites import FOLDER_SUITES, suite_classes, suite_parts
from fastnull.robustness.table import summarize
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.solvers import norms, valid_noise
from fastnull.synthesis.starts import draw_start

START_RESULTS = "start.json"
WEIGHTS = "last.safetensors"
CALIBRATION_IMAGES = 256
SCALED_TO_NORM = ("limit", "smooth_limit")
"""Settings of random noise that `norm_of` scales."""
NEEDY = ("apgd_t", "patch", "noise", "corruptions")
"""Suites that do not support all models and images: they need a number of classes, an image size, a shape of tokens."""
FOLDER_IMAGES = 10_000
"""Number of images that the progress bar assumes for a published test set. Counting its files can take minutes."""


@dataclass(frozen=True)
class Inputs:
    """Model and data given as Python objects instead of names. They are pickled if there are several processes.

    Attributes:
        model: makes a model that takes pixels in [0, 1] and returns logits; called once for every run.
        train_data, test_data: see run_compare.
    """

    model: Callable[[], nn.Module] | None = None
    train_data: Data | None = None
    test_data: Data | None = None

    def make(self, seed: int, start: Path | None = None) -> nn.Module | None:
        """A new model with the weights in the folder `start`; None if no function is given. Random weights are the same
        for all runs of a seed."""
        if self.model is None:
            return None
        with keyed(seed):
            model = self.model()
        if start is not None:
            from safetensors.torch import load_file

            network_of(model).load_state_dict(load_file(str(start / WEIGHTS)))
            head_is_trained(model)
        return model


@dataclass(frozen=True)
class Task:
    """A finetuning run (or the start, if `method` is None) and its evaluation.

    Attributes:
        plan: steps of the training; None if the start is only evaluated.
        start: folder of the run whose weights this one begins with, if the comparison trains them.
        norm_of: folder of the run whose noise has the norm that this one's noise gets; None: its own norm.
        cost: rough cost of training and evaluation, in forward passes of the model for one image.
    """

    seed: int
    method: str | None
    config: FinetuneConfig
    evaluations: tuple[EvaluationSettings, ...]
    settings: CompareSettings
    inputs: Inputs
    plan: Plan | None
    start: Path | None
    norm_of: Path | None
    cost: float

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"seed {self.seed}, {self.method or START}"

    @property
    def folder(self) -> Path:
        """Output folder of the run."""
        return Path(self.config.out or "")

    @property
    def after(self) -> tuple[Path, ...]:
        """Folders of the runs that must be finished before."""
        return tuple(folder for folder in (self.start, self.norm_of) if folder is not None)

    @property
    def results(self) -> Path:
        """The file that is written last; the run is finished if it exists."""
        return self.folder / (START_RESULTS if self.method is None else RESULTS)

    def model(self) -> nn.Module | None:
        """A new model with the weights that the run begins with; None if the configuration names the model."""
        return self.inputs.make(self.seed, self.start)


def place(folder: Path, seed: int, name: str) -> Path:
    """The folder of a run."""
    return folder / f"seed-{seed}" / name


def plan_tasks(
    folder: Path, settings: CompareSettings, inputs: Inputs, *, label: bool = False
) -> tuple[list[Task], dict[str, Any], Prepared]:
    """Open data and model, check all settings against them, and list the runs in an order in which they can run.

    Returns:
        The tasks; the description of data and model for reports (JSON-able); and the data with a model at the start.

    Raises:
        ValueError, TypeError: errors that would otherwise stop a run later, see run_compare.
    """
    check_device(settings.where)
    if inputs.model is None and not settings.network:
        raise ValueError(f"model is needed with data {settings.data!r}: give its name")
    if inputs.train_data is not None and inputs.test_data is None and settings.split == "test":
        raise ValueError("train_data needs test_data beside it, or split='held-out'")
    if inputs.model is not None and (settings.checkpoint is not None or settings.pretrained):
        raise ValueError("checkpoint and pretrained are for a model by name; the function makes its own weights")
    given: dict[str, Any] = {"checkpoint": settings.checkpoint, "pretrained": settings.pretrained}
    if isinstance(inputs.model, nn.Module):
        raise TypeError(
            f"model must be a function that returns a new model for each run; got a {type(inputs.model).__name__}"
        )
    model = inputs.make(settings.first_seed)
    if model is not None and inputs.make(settings.first_seed) is model:
        raise ValueError("model must make a new model each time it is called; it returned the same one twice")
    probe = settings.clean(**given)
    with preserved(), Quiet():
        ready = prepare(probe, torch.device(settings.where), model, inputs.train_data)
        test = evaluation_set(settings, probe, inputs, ready.model)
    kind = "trained"
    if inputs.model is None:
        loaded = settings.pretrained or settings.checkpoint is not None
        kind = "random" if not loaded else "new head" if getattr(ready.model, "new_head", False) else "trained"
    tasks = list(_tasks(folder, settings, inputs, kind, len(ready.train), len(test), given, label))
    _check_evaluation(settings, ready.model, test)
    with preserved():
        for task in tasks:
            if task.seed == settings.first_seed and task.plan is not None:
                _check_training(task, ready)
    weights = settings.checkpoint or ("pretrained" if settings.pretrained else None)
    # embedded data is computed, with rounding that differs between machines
    own = inputs.train_data is not None or inputs.test_data is not None or settings.data not in EMBEDDED
    about = {
        "model": settings.network or type(network_of(ready.model)).__name__,
        "parameters": sum(parameter.numel() for parameter in ready.model.parameters()),
        "weights": "random" if kind == "random" else weights,
        "checkpoint": None if settings.checkpoint is None else file_digest(settings.checkpoint),
        "new_head": kind == "new head",
        "start_epochs": 0 if tasks[0].plan is None else tasks[0].config.epochs,
        "data": settings.data,
        "classes": ready.classes,
        "pixels": list(test[0][0].shape[1:]),
        "train": len(ready.train),
        "test": len(test),  # type: ignore[arg-type]
        "train_digest": cheap_digest(ready.train) if own else None,
        "test_digest": cheap_digest(test) if own else None,
    }
    return tasks, about, ready


def _tasks(
    folder: Path, settings: CompareSettings, inputs: Inputs, kind: str, train: int, test: int,
    given: dict[str, Any], label: bool,
) -> Iterator[Task]:  # fmt: skip
    evaluations = tuple(settings.evaluations())
    clean = (
        EvaluationSettings(("clean",), batch_size=settings.eval_batch_size, workers=settings.workers, progress=False),
    )
    # methods that need the norm of another one go last
    methods = sorted(settings.methods, key=lambda method: NORM_OF in settings.recipe(method))
    measuring = sum(evaluation_cost(each, test) for each in evaluations)
    for seed in settings.seed_list:
        first = place(folder, seed, START)
        writing = {"seed": seed, "resume": True}
        start = settings.start(kind, seed, **given, out=str(first), resume=True)
        if start is not None:
            plan = _plan(START, start, train)
            yield Task(seed, None, start, clean, settings, inputs, plan, None, None, plan.total_cost + test)
        elif seed == settings.first_seed:  # the other seeds begin with the same weights
            config = settings.clean(**given, **writing, out=str(first))
            yield Task(seed, None, config, clean, settings, inputs, None, None, None, test)
        for method in methods:
            begin = given if start is None else {"checkpoint": str(first / WEIGHTS)}
            config = settings.configuration(
                method, **begin, **writing, compute_budget=settings.budget, out=str(place(folder, seed, method)),
                label=method if label else None,
            )  # fmt: skip
            other = settings.recipe(method).get(NORM_OF)
            plan = _plan(method, config, train)
            yield Task(
                seed, method, config, evaluations, settings, inputs, plan, None if start is None else first,
                None if other is None else place(folder, seed, other), plan.total_cost + measuring,
            )  # fmt: skip


def _plan(name: str, config: FinetuneConfig, images: int) -> Plan:
    try:
        return make_plan(config, images)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).replace('compute_budget', 'budget')}") from error


def _check_training(task: Task, ready: Prepared) -> None:
    """Raise the error that the training would raise before its first step."""
    assert task.plan is not None
    device, alone = torch.device(task.settings.where), Processes()
    try:
        if task.start is None:
            check_start(task.config, ready.model)
        Training(task.config, ready.model, task.plan, ready.num_classes, device, alone)
        cache_of(task.config, ready, device, alone)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{task.method or START}: {error}") from error


def _check_evaluation(settings: CompareSettings, model: nn.Module, test: Dataset[Any]) -> None:
    """Raise ValueError for test images, corruptions and test sets that the evaluation does not support."""
    count = len(test)  # type: ignore[arg-type]
    if settings.split == "held-out" and count < settings.batch_size:
        raise ValueError(
            f"the held-out split has {count} images, fewer than a batch of {settings.batch_size}: it is too small to "
            "choose settings on; use more training images or a smaller batch_size"
        )
    images, labels = default_collate([test[0]])
    check_images(images, name="test images")
    noise = None if settings.noise is None else Noise.load(settings.noise)
    # corruption before resizing needs the files
    data: Any = (images, labels) if settings.corruption_size is None else test
    for each in settings.evaluations():
        for part in each.folders:
            suite_classes(part, settings.root or "", model)
        tried = tuple(suite for suite in each.suites if suite in NEEDY)
        if tried:
            short: dict[str, Any] = {"eps": each.eps[:1], "severities": each.severities[:1], "steps": 1, "restarts": 1}
            evaluate(model, data, replace(each, suites=tried, limit=1, **short), noise=noise)


def file_digest(path: str) -> str:
    """Digest of the bytes of a file."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def evaluation_set(settings: CompareSettings, config: FinetuneConfig, inputs: Inputs, model: nn.Module) -> Dataset[Any]:
    """The evaluation images, with labels that are class indices of the model."""
    if settings.split == "test" and inputs.test_data is None:
        where: dict[str, Any] = {"data_dir": config.data_dir, "download": config.download}
        return evaluation_data(config.data, model, **where, skip_bad=settings.skip_bad)
    other = inputs.test_data if settings.split == "test" else None
    found = prepare(config, next(model.parameters()).device, model, inputs.train_data, other).validation
    assert found is not None
    if isinstance(found, Samples) and found.transform is not None:
        evaluation = found.transform  # makes bytes
        found.transform = lambda image: to_pixels(evaluation(image))
        found.shown = str(View.of(model))
    return found


def work(task: Task, tell: Callable[[float], None] = lambda _: None) -> str:
    """Finetune and evaluate.

    Args:
        task: the run.
        tell: called with the number of forward passes since the last call.

    Returns:
        A line with the results.
    """
    config, device = task.config, torch.device(task.settings.where)
    with Quiet():
        # steps of this run from before it was stopped are reported too
        if task.plan is None:
            with preserved(), keyed(task.seed):
                model = prepare(config, device, task.model(), task.inputs.train_data).model
            line = task.name
        else:
            if task.norm_of is not None:
                with preserved():
                    ready = prepare(config, device, task.model(), task.inputs.train_data)
                    config = _equal_norm(config, task.norm_of, ready)
            per_step = task.plan.total_cost / task.plan.steps

            def trained(bar: str, steps: float) -> None:
                if bar == config.augment:  # decoding of images and refreshing of noise have their own bars
                    tell(steps * per_step)

            with listening(trained):
                result = finetune(config, task.model(), task.inputs.train_data)
            model, line = result.model, f"{task.name}: {result.plan.steps} steps, {result.seconds['total']:.0f} s"
        summary = _measure(task, config, model, tell)["summary"]
    # the results are complete: the training states are no longer needed
    unneeded = ["state-*.pt"]
    if not task.settings.keep_weights and task.method is not None:
        unneeded.append("*.safetensors")
    for pattern in unneeded:
        for path in task.folder.glob(pattern):
            path.unlink()
    names = {"clean": "clean", "adversarial_mean": "under attack", "corruption_mean": "corrupted"}
    found = [f"{text} {summary[name]:.1f} %" for name, text in names.items() if summary.get(name) is not None]
    return f"{line}; {', '.join(found)}" if found else line


def _measure(task: Task, config: FinetuneConfig, model: nn.Module, tell: Callable[[float], None]) -> dict[str, Any]:
    """Run all evaluations, each with its own file, then merge them into one file."""
    data = evaluation_set(task.settings, config, task.inputs, model)
    noise = None if task.settings.noise is None else Noise.load(task.settings.noise)
    parts, records = [], []
    for number, settings in enumerate(task.evaluations):
        costs = {suite: number_cost(suite, settings) for suite in settings.suites}
        parts.append(task.folder / f"part-{number}.json")

        def heard(name: str, images: float, costs: dict[str, float] = costs) -> None:
            tell(images * costs[name.partition("/")[0]])

        with listening(heard):
            records.append(evaluate(model, data, settings, noise=noise, out=str(parts[-1])))
    record = merged(records)
    write_json(task.results, record)
    for part in parts:
        part.unlink()
    return record


def merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge results of `evaluate` for the same data and model, with different suites and numbers of images.

    The protocol is that of the first result, with all suites and what only the others know; `suite_images` has the
    number of images of each suite.
    """
    results: dict[str, Any] = {}
    images: dict[str, Any] = {}
    counts: dict[str, int | None] = {}
    for record in records:
        results |= record["results"]
        images |= record["images"]
        counts |= dict.fromkeys(record["protocol"]["suites"], record["protocol"]["n"])
    protocol = {**records[0]["protocol"], "suites": list(counts), "suite_images": counts}
    for name, unused in (("backend", "autograd"), ("autoattack", None), ("folders", {})):
        protocol[name] = next((r["protocol"][name] for r in records if r["protocol"][name] != unused), unused)
    if len(records) > 1:
        protocol["subset"] = "where fewer than all, drawn evenly over the classes by the seed"
    return {"protocol": protocol, "results": results, "images": images, "summary": summarize(results)}


def number_cost(suite: str, settings: EvaluationSettings) -> float:
    """Rough number of forward passes per image for one measurement of a suite."""
    walk = 2 * settings.steps * settings.restarts + 1
    costs = {
        "fgsm": 3, "mi_fgsm": walk, "pgd": walk, "apgd": walk, "apgd_t": 9 * walk, "autoattack": 3000,
        "cw": 2 * CW["steps"] + 1, "patch": 101,
    }  # fmt: skip
    return costs.get(suite, 1)


def numbers_of(suite: str, settings: EvaluationSettings) -> int:
    """Number of measurements in a suite."""
    if suite in BALL_ATTACKS:
        return len(settings.eps)
    if suite == "corruptions":
        return len(settings.corruptions) * len(settings.severities)
    if suite in FOLDER_SUITES:
        return len(suite_parts(suite, settings.severities))
    return 2 if suite == "noise" else 1


def images_of(suite: str, settings: EvaluationSettings, test: int) -> int:
    """Number of images that a suite uses out of `test`, or of a published set."""
    there = FOLDER_IMAGES if suite in FOLDER_SUITES else test
    return there if settings.limit is None else min(there, settings.limit)


def evaluation_cost(settings: EvaluationSettings, test: int) -> float:
    """Rough number of forward passes of an evaluation on `test` images."""
    return sum(
        number_cost(suite, settings) * numbers_of(suite, settings) * images_of(suite, settings, test)
        for suite in settings.suites
    )


def _equal_norm(config: FinetuneConfig, other: Path, ready: Prepared) -> FinetuneConfig:
    """Scale the limits of random noise to the mean norm of another run's noise over its steps."""
    records = read_metrics(other / METRICS)
    seen = [record["norm"] for record in records if record.get("kind") == "step" and "norm" in record]
    if not seen:
        raise ValueError(f"{other} logged no norm of its noise: random noise cannot take its norm")
    labels = labels_of(ready.train)
    chosen = range(min(CALIBRATION_IMAGES, len(ready.train)))
    if labels is not None:
        chosen = even_subset(labels, CALIBRATION_IMAGES, 0).tolist()
    device = next(ready.model.parameters()).device
    images = to_pixels(torch.stack([ready.train[index][0] for index in chosen]), device)
    inputs = FrozenEncoder(ready.model.eval(), site=config.site).embed(images)
    start = config.synthesis()
    assert start is not None
    scale = scale_of_norm(statistics.fmean(seen), inputs, start)
    scaled: dict[str, Any] = {name: scale * getattr(start, name) for name in SCALED_TO_NORM}
    return replace(config, noise=replace(start, **scaled))


def scale_of_norm(norm: float, inputs: Tensor, start: SynthesisConfig) -> float:
    """The factor on the limits of a start for which the noise on `inputs` has the mean L2 norm `norm`.

    Noise in pixels is clipped so that pixels stay in [0, 1], so the factor is found by bisection.

    Args:
        norm: in units of the site.
        inputs: [B, ...], what the noise is added to.
        start: settings with the site and the limits.

    Raises:
        ValueError: no noise of this kind in pixels has so large a norm.
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


class Quiet(warnings.catch_warnings):
    """Suppress warnings about what every report shows: universal noise that did not reach ε, and a new head."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        for message in ("the universal noise", ".*its head (has|is for)"):
            warnings.filterwarnings("ignore", message=message)
        return found
