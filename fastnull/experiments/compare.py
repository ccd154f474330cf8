"""Compares methods: finetunes a model with each of them, over several seeds at equal compute, and evaluates all alike.

    fastnull compare --data digits --seeds 5 --out runs/digits
    fastnull compare --model vit_small_patch16_224 --pretrained --data images --out runs/images

All runs use `finetune` and `evaluate`. Each seed and method has its own folder. A finished run is not repeated, and a
stopped run continues. The settings are in `settings.py`, the runs in `tasks.py`.
"""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastnull.checks import check_number
from fastnull.experiments.settings import NORM_OF, START, CompareSettings, changed, plain
from fastnull.experiments.tasks import SCALED_TO_NORM, WEIGHTS, Inputs, Task, place, plan_tasks, work
from fastnull.experiments.workers import Progress, run_in_processes, threads
from fastnull.finetune.config import SMALL_MODELS
from fastnull.finetune.prepare import Data
from fastnull.paths import same_setting
from fastnull.progress import progress_bar
from fastnull.record import provenance, read_json, replacing, write_json
from fastnull.report import write_report
from fastnull.report.comparison import format_comparison, summarize_runs
from fastnull.report.runs import RESULTS, SETTINGS, load_runs

OWN_FILES = ("seed-*", "workers.log", "report/report.html", "report/report.md", "report/figures/*.png")
"""Patterns of the files in the folder, besides the settings."""
_NEEDED = {"digits": ("scikit-learn", "sklearn"), "photos": ("scikit-image", "skimage")}


def run_compare(
    out: str | os.PathLike[str],
    settings: CompareSettings | None = None,
    *,
    model: Callable[[], nn.Module] | None = None,
    train_data: Data | None = None,
    test_data: Data | None = None,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the starts, finetune with every method, evaluate, and summarise the results.

    Args:
        out: output folder for comparison.json, comparison.md, a report with plots and the folders of the runs.
        settings: see CompareSettings.
        model: a function that makes the model, which takes pixels in [0, 1] and returns logits [B, K]; called once for
            each run. None: the model that `settings` name.
        train_data: a dataset of (image, label) as for `finetune`, whose name in the report is `settings.data`. None
            opens `settings.data`.
        test_data: a dataset of (image [C, H, W] in [0, 1], label), or a pair (images, labels) of tensors.
        overwrite, resume, jobs, progress: see run_methods.

    Returns:
        The contents of comparison.json: settings, `about` (data, model and the accuracy at the start), a record of each
        method (see report.comparison.summarize_runs), paired differences with 95 % confidence intervals, and
        provenance.

    Raises:
        ValueError, TypeError: settings that do not fit model or data, reported before anything is written; the folder
            holds a comparison and neither overwrite nor resume is given, or one with other settings or with finished
            runs that are no longer asked for.
        ImportError: scikit-learn, scikit-image or matplotlib is missing.
        KeyboardInterrupt: on Ctrl-C, after the current runs have saved their state.
    """
    settings = settings or CompareSettings()
    folder = Path(out)
    started = time.perf_counter()
    about = run_methods(
        folder,
        settings,
        Inputs(model, train_data, test_data),
        kind="comparison",
        overwrite=overwrite,
        resume=resume,
        jobs=jobs,
        progress=progress,
        label=True,
    )
    # read back from the files, so that a resumed comparison is complete
    runs = load_runs([place(folder, seed, method) for method in settings.methods for seed in settings.seed_list])
    record = {
        "settings": asdict(settings),
        "about": about,
        **summarize_runs(runs, settings.methods),
        "seconds": time.perf_counter() - started,
        "jobs": jobs,
        "provenance": provenance(settings.where),
    }
    write_json(folder / "comparison.json", record)
    with replacing(folder / "comparison.md") as beside:
        beside.write_text(format_comparison(record), encoding="utf-8")
    write_report([folder], folder / "report", overwrite=True)
    return record


def run_methods(
    folder: Path,
    settings: CompareSettings,
    inputs: Inputs | None = None,
    *,
    kind: str,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
    progress: bool = True,
    label: bool = False,
) -> dict[str, Any]:
    """Do all runs that are not finished, each in folder/seed-S/METHOD.

    Args:
        folder: output folder; the settings are written to `kind`.json.
        settings: see CompareSettings.
        inputs: model and data given as objects instead of names.
        kind: name of the experiment in files and messages.
        overwrite: start over if the folder holds one.
        resume: continue it; finished runs are not repeated. Methods, recipes and seeds can be added to them.
        jobs: number of processes. Small models use one thread in each, so results do not depend on `jobs`; other models
            divide the threads. With more than one, model and data must be picklable, and a script that calls this needs
            the usual `if __name__ == "__main__"`.
        progress: show a progress bar for all runs, and a line for each finished one.
        label: name the runs in reports by their methods.

    Returns:
        Description of data and model for reports, with `start_accuracy`: seed → clean accuracy at the start in %.

    Raises: as run_compare.
    """
    check_number("jobs", jobs, 1)
    _check_extras(settings, kind)
    inputs = inputs or Inputs()
    if jobs > 1:
        _check_picklable(inputs)
    tasks, about = plan_tasks(folder, settings, inputs, label=label)[:2]
    _prepare(folder, settings, about, kind, overwrite, resume, tasks)
    finished = _finished(tasks)
    count = thread_count(settings, jobs)
    total, done = (sum(task.cost for task in some) for some in (tasks, finished))
    with (
        threads(count),
        progress_bar(
            round(total), show=progress, initial=round(done), unit=" passes", unit_scale=True, desc=kind
        ) as bar,
    ):
        shown = Progress(bar, len(tasks), len(finished))
        waiting = [task for task in tasks if task not in finished]
        if jobs == 1:
            for task in waiting:
                shown.begin(task)
                shown.finish(task, work(task, functools.partial(shown.advance, task)))
        else:
            done_folders = {task.folder for task in finished}
            run_in_processes(work, waiting, jobs, folder / "workers.log", shown, count, done_folders)
    starts = {task.seed: read_json(task.results)["summary"]["clean"] for task in tasks if task.method is None}
    if not settings.keep_weights:
        for task in tasks:
            (task.folder / WEIGHTS).unlink(missing_ok=True)
    return {**about, "start_accuracy": starts}


def weights(folder: Path, seed: int) -> Path:
    """Path of the weights that the methods of a seed start from."""
    return place(folder, seed, START) / WEIGHTS


def thread_count(settings: CompareSettings, jobs: int) -> int:
    """Number of threads per process; one for small models, where synchronisation costs more than it gains."""
    return 1 if settings.network in SMALL_MODELS else max(1, torch.get_num_threads() // jobs)


def _finished(tasks: Sequence[Task]) -> list[Task]:
    """Tasks with results, except starts whose weights are missing and needed by a method of their seed."""
    needed = {task.start for task in tasks if not task.results.exists()}
    return [
        task
        for task in tasks
        if task.results.exists()
        and (task.method is not None or task.folder not in needed or (task.folder / WEIGHTS).exists())
    ]


def _check_extras(settings: CompareSettings, kind: str) -> None:
    """Raise ImportError for missing packages of data and report, before any work is done."""
    data = [_NEEDED[settings.data]] if settings.data in _NEEDED else []
    for package, module in (*data, *((name, name.replace("-it-py", "_it")) for name in _OF_REPORTS)):
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(f"the {kind} needs {package}: pip install fastnull[demo] ({error})") from error


_OF_REPORTS = ("matplotlib", "markdown-it-py", "scipy")


def _check_picklable(inputs: Inputs) -> None:
    try:
        pickle.dumps(inputs)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"jobs must be 1 here: model and data cannot be pickled for other processes ({error}). A function at the "
            "top level of a module can be pickled, a lambda cannot"
        ) from error


def _prepare(
    folder: Path,
    settings: CompareSettings,
    about: Mapping[str, Any],
    kind: str,
    overwrite: bool,
    resume: bool,
    tasks: Sequence[Task] = (),
) -> None:
    """Prepare the folder, write the settings and what data and model are; raise ValueError if it cannot be used.

    All settings may change until a method is finished, then those in GROWING. Runs begun with others are removed.
    """
    if overwrite and resume:
        raise ValueError("give either resume or overwrite, not both")
    path = folder / f"{kind}.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder; {folder} is a file")
    held = path.exists()
    if not held and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {kind}: give another folder")
    removed = list(folder.glob("seed-*")) if held else []
    if held and not overwrite:
        finished = {results.parent for results in folder.glob(f"seed-*/*/{RESULTS}")}
        if finished and not resume:
            raise ValueError(f"{folder} holds a {kind} already: resume=True continues it, overwrite=True starts over")
        before, begun = _recorded(path, kind, type(settings))
        differing = changed(before, settings) or [
            f"{name} (was {begun[name]!r}, now {value!r})"
            for name, value in plain(about).items()
            if not same_setting(begun.get(name, value), value)
        ]
        if finished or not differing:
            was, now = (plain({name: each.recipe(name) for name in each.methods}) for each in (before, settings))
            removed = [run for run in folder.glob("seed-*/*") if was.get(run.name) != now.get(run.name)]
            asked = {place(folder, seed, method) for seed in settings.seed_list for method in settings.methods}
            differing += sorted({f"recipe of {run.name}" for run in removed if run in finished & asked})
            others = [(task, _other_recipe(task)) for task in tasks if task.folder not in removed]
            removed += [task.folder for task, found in others if found and not task.results.exists()]
            differing = differing or sorted({text for task, found in others if task.results.exists() for text in found})
            lost = sorted(finished - asked)
            if differing:
                raise ValueError(f"cannot resume the {kind} in {folder} with other settings: {', '.join(differing)}")
            if lost:
                raise ValueError(
                    f"cannot resume the {kind} in {folder} without {lost[0].relative_to(folder)}, which is finished: "
                    "methods and seeds can be added, not removed"
                )
    for run in removed:
        shutil.rmtree(run)
    write_json(path, {"settings": asdict(settings), "begun": about})


def _other_recipe(task: Task) -> list[str]:
    """Where the noise or the recipe of a run that was begun differs from what this version has under the same name."""
    if task.method is None or not (task.folder / SETTINGS).exists():
        return []
    record = read_json(task.folder / SETTINGS)
    names = task.settings.recipe(task.method).keys() - {"noise", NORM_OF}
    recipe = {name: getattr(task.config, name) for name in names}
    if recipe.get("lr", 0) is None:  # chosen by `finetune`
        del recipe["lr"]
    synthesis = task.config.synthesis()
    noise = {} if synthesis is None else asdict(synthesis)
    if task.norm_of is not None:
        for name in SCALED_TO_NORM:
            del noise[name]
    pairs = [(record["config"], recipe), (record["synthesis"] or {}, noise)]
    return sorted(
        f"{name} of {task.method} (was {before[name]!r}, now {value!r})"
        for before, now in pairs
        for name, value in plain(now).items()
        if name in before and name != "seed" and before[name] != value
    )


def _recorded(path: Path, kind: str, settings: type[CompareSettings]) -> tuple[CompareSettings, dict[str, Any]]:
    """The settings in the record of an experiment, and what it says about data and model."""
    record = read_json(path)
    try:
        return settings(**record["settings"]), dict(record.get("about") or record.get("begun") or {})
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a record of a {kind} of this version ({error}); overwrite=True starts over"
        ) from error
