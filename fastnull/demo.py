"""The demo: six ways of finetuning a small ViT on digits at equal compute, measured in the same way, with a report.

Everything goes through `finetune` and `evaluate`, as a run of one's own would. Each (seed, method) is a folder of its
own; where it is finished it is not done again, and where it was interrupted it goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from fastnull.checks import check_choice, check_number
from fastnull.data import digits, evaluation_data
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.models import load_model
from fastnull.progress import progress_bar, watched
from fastnull.record import provenance, write_json
from fastnull.report import DEMO, write_report
from fastnull.report.illustrations import FILE as NOISE
from fastnull.report.illustrations import illustrate
from fastnull.report.runs import RESULTS
from fastnull.robustness import evaluate

RECIPES: dict[str, dict[str, Any]] = {
    # method → changes to the configuration that all share; settings from trials on the same data
    "clean-only": {"augment": "none"},
    "random": {"augment": "random", "limit": 0.5},
    # a start of ±3, as published, or of ±1 stays far above ε on this model at what rounds may cost here
    "universal": {"augment": "universal", "limit": 0.5, "eps": 0.03, "noise_lr": 0.1, "rounds": 3, "image_ratio": 1.0},
    "boundary-tokens": {"augment": "boundary", "limit": 0.25, "eps": 0.6, "noise_steps": 3},
    "boundary-pixels": {"augment": "boundary", "site": "pixels", "limit": 8 / 255, "eps": 0.3, "noise_steps": 3},
    "adversarial": {
        "augment": "adversarial", "attack_eps": 6 / 255, "attack_steps": 3, "attack_step_size": 4 / 255,
    },
}  # fmt: skip

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does.

    Attributes:
        seeds: each has its own pretrained model and all methods.
        methods: names in RECIPES.
        pretrain_epochs, pretrain_lr: of clean training from random weights.
        budget: of each finetuning, in forward passes for each training image; 156 are 12 epochs of boundary noise in
            three steps, or 52 clean ones.
        lr, batch_size: of each finetuning; batch_size also of the pretraining.
        eps: radii of the attacks in 1/255 of the pixel range.
        pgd_steps: of PGD.
        severities: of the corruptions.
        images: test images that are used; None takes all 500.
        quick: the report says that the numbers rank nothing.
    """

    seeds: int = 3
    methods: tuple[str, ...] = tuple(RECIPES)
    pretrain_epochs: int = 40
    pretrain_lr: float = 2e-3
    budget: float = 156.0
    lr: float = 5e-4
    batch_size: int = 64
    eps: tuple[float, ...] = (1, 2, 4, 8)
    pgd_steps: int = 10
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    images: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        check_number("seeds", self.seeds, 1)
        for method in self.methods:
            check_choice("method", method, RECIPES)

    @classmethod
    def quickly(cls) -> DemoSettings:
        """One seed, short training, fewer attacks: shows in a minute that everything works."""
        return cls(
            seeds=1, pretrain_epochs=20, budget=65, eps=(2, 4, 8), pgd_steps=5, severities=(1, 3, 5), quick=True
        )  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """A finetuning (or the pretraining, which no `method` names) and its evaluation."""

    seed: int
    method: str | None
    config: FinetuneConfig
    evaluation: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.method or PRETRAINED}"


def run_demo(
    out: str | os.PathLike[str],
    settings: DemoSettings | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
    progress: bool = True,
) -> Path:
    """Pretrain, finetune with every method, evaluate, and write the report.

    Args:
        out: folder of the demo; the report goes to its folder `report`.
        settings: see DemoSettings.
        overwrite: start over in a folder that holds a demo.
        resume: go on in it; what is finished is not done again.
        jobs: processes. Each computes with one thread, so the numbers do not depend on it. With more than one, a script
            that calls this needs the usual `if __name__ == "__main__"`.
        progress: show a progress bar and a line for each finished run.

    Returns:
        The path of report.html.

    Raises:
        ValueError: the folder holds a demo and neither overwrite nor resume is given, or one with other settings.
        ImportError: scikit-learn or matplotlib is missing.
        KeyboardInterrupt: on Ctrl-C, after the runs that were going have saved their state.
    """
    _check_extras()
    check_number("jobs", jobs, 1)
    settings = settings or DemoSettings()
    folder = Path(out)
    _prepare(folder, settings, overwrite, resume)
    started = time.perf_counter()
    with _one_thread():
        if jobs == 1:
            _run_here(folder, settings, progress)
        else:
            _run_in_processes(folder, settings, jobs, progress)
        _illustrate(folder, settings)
        model = load_model(_weights(folder, 0))
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


def _check_extras() -> None:
    """Before any work is done: what the data and the report need."""
    for package, module in (("scikit-learn", "sklearn"), ("matplotlib", "matplotlib")):
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(f"the demo needs {package}: pip install fastnull[demo] ({error})") from error


def _prepare(folder: Path, settings: DemoSettings, overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise ValueError("give either resume or overwrite, not both")
    path = folder / DEMO
    if folder.is_file():
        raise ValueError(f"out must be a folder; {folder} is a file")
    if path.exists() and not (overwrite or resume):
        raise ValueError(f"{folder} holds a demo already: resume=True goes on with it, overwrite=True starts over")
    if not path.exists() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no demo: give another folder")
    if path.exists() and resume:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        now = json.loads(json.dumps(asdict(settings)))  # tuples become lists, as in the file
        changed = [field.name for field in fields(settings) if before.get(field.name) != now[field.name]]
        if changed:
            raise ValueError(f"cannot resume the demo in {folder} with other settings: {', '.join(changed)}")
    elif path.exists():
        for found in folder.glob("seed-*"):
            shutil.rmtree(found)
        (folder / NOISE).unlink(missing_ok=True)
    write_json(path, {"settings": asdict(settings)})


def _tasks(folder: Path, settings: DemoSettings) -> Iterator[tuple[_Task, list[_Task]]]:
    """Each seed's pretraining, and what can start once it is done."""
    common = FinetuneConfig(
        model="vit_digits", data="digits", val_fraction=0.0, batch_size=settings.batch_size, device="cpu", resume=True,
        out=str(folder), progress=False,
    )  # fmt: skip
    evaluation = {
        "eps": [radius / 255 for radius in settings.eps],
        "steps": settings.pgd_steps,
        "severities": settings.severities,
        "limit": settings.images,
    }
    for seed in range(settings.seeds):
        pretraining = replace(
            common, augment="none", epochs=settings.pretrain_epochs, lr=settings.pretrain_lr, seed=seed,
            warmup_epochs=0.3 * settings.pretrain_epochs, out=str(_place(folder, seed, PRETRAINED)),
        )  # fmt: skip
        finetuning = replace(
            common, compute_budget=settings.budget, lr=settings.lr, warmup_epochs=2, seed=seed,
            checkpoint=str(_weights(folder, seed)),
        )  # fmt: skip
        methods = []
        for method in settings.methods:
            config = replace(finetuning, out=str(_place(folder, seed, method)), **RECIPES[method])
            methods.append(_Task(seed, method, config, evaluation))
        yield _Task(seed, None, pretraining, evaluation), methods


def _place(folder: Path, seed: int, name: str) -> Path:
    return folder / f"seed-{seed}" / name


def _weights(folder: Path, seed: int) -> Path:
    return _place(folder, seed, PRETRAINED) / "last.safetensors"


def _work(task: _Task) -> str:
    """Finetune and evaluate; returns the line that says what came out."""
    with warnings.catch_warnings():
        # that a universal noise did not meet ε: the report shows the influence that it had
        warnings.filterwarnings("ignore", message="the universal noise")
        result = finetune(task.config)
    line = f"{task.name}: {result.plan.steps} steps, {result.seconds['total']:.0f} s"
    if task.method is None:
        return line
    model = result.model
    found = evaluate(
        model,
        evaluation_data("digits", model),
        **task.evaluation,
        out=Path(task.config.out or "") / RESULTS,
        progress=False,
    )
    summary = found["summary"]
    return (
        f"{line}; clean {summary['clean']:.1f} %, under attack {summary['adversarial_mean']:.1f} %, "
        f"corrupted {summary['corruption_mean']:.1f} %"
    )


def _run_here(folder: Path, settings: DemoSettings, progress: bool) -> None:
    with _bar(settings, progress) as bar:
        for pretraining, methods in _tasks(folder, settings):
            for task in (pretraining, *methods):
                bar.set_description(task.name)
                _report_done(bar, _work(task))


def _run_in_processes(folder: Path, settings: DemoSettings, jobs: int, progress: bool) -> None:
    log = folder / "workers.log"
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(log,))
    tasks = list(_tasks(folder, settings))
    following = {pretraining.seed: methods for pretraining, methods in tasks}
    waiting = deque(pretraining for pretraining, _ in tasks)
    running: dict[Future[str], _Task] = {}
    with pool, _bar(settings, progress) as bar:
        while waiting or running:
            # no more than can start: what a pool has taken in runs to its end, also after Ctrl-C
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                running[pool.submit(_work, task)] = task
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                _report_done(bar, future.result())
                if task.method is None:
                    waiting.extend(following[task.seed])
            if watched():
                bar.refresh()  # its clock goes on


def _start_worker(log: Path) -> None:
    """One thread; Ctrl-C left to `finetune`, which saves its state; messages to a file; no life without a parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(log, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _bar(settings: DemoSettings, progress: bool) -> Any:
    total = settings.seeds * (1 + len(settings.methods))
    return progress_bar(total, show=progress, unit=" run", desc="demo")


def _report_done(bar: Any, line: str) -> None:
    if not bar.disable:
        bar.write(line)
    bar.update()


@contextmanager
def _one_thread() -> Iterator[None]:
    """This model is too small to share out: two threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _illustrate(folder: Path, settings: DemoSettings) -> None:
    path = folder / NOISE
    # to be looked at, once: with rounds enough to come below ε
    config = replace(FinetuneConfig(**RECIPES["universal"]), rounds=10).synthesis()
    if path.exists() or config is None:
        return
    train, test = digits()
    images = test.tensors[0][: settings.images]
    illustrate(load_model(_weights(folder, 0)), train.tensors[0], images, config, settings.batch_size).save(path)
