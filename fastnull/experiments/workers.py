"""Tasks in several processes, which end with their parent; and the progress bar over all of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fastnull.progress import watched


class Ordered(Protocol):
    """A task with a folder of its own, which may have to wait for another one's."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def after(self) -> Path | None: ...

    @property
    def cost(self) -> float: ...


Task = TypeVar("Task", bound=Ordered)
Work = Callable[[Task, Callable[[float], None]], str]
"""Does a task and returns the line that says what came out; calls its second argument with the cost of what it did."""


class Progress:
    """A bar whose unit is the cost of tasks.

    Args:
        bar: of `progress_bar`; its total is the cost of all tasks.
        total: number of tasks.
        done: how many are finished already.
    """

    def __init__(self, bar: Any, total: int, done: int) -> None:
        self._bar, self._total, self._done = bar, total, done
        self._seen: dict[Path, float] = {}

    def begin(self, task: Ordered) -> None:
        """Name the task that runs."""
        self._bar.set_description(f"{self._done}/{self._total} runs; {task.name}", refresh=watched())

    def advance(self, task: Ordered, cost: float) -> None:
        """Count work of a task; never more than its cost, which is an estimate."""
        before = self._seen.get(task.folder, 0.0)
        self._seen[task.folder] = min(task.cost, before + cost)
        self._bar.update(self._seen[task.folder] - before)

    def finish(self, task: Ordered, line: str) -> None:
        """Show the line of a finished task above the bar, and count the rest of its cost."""
        if not self._bar.disable:
            self._bar.write(line)
        self.advance(task, task.cost)
        self._done += 1
        self._bar.set_description(f"{self._done}/{self._total} runs", refresh=watched())

    def refresh(self) -> None:
        """Let the clock of a bar on a terminal go on."""
        if watched():
            self._bar.refresh()


def run_in_processes(
    work: Work[Task],
    tasks: Sequence[Task],
    jobs: int,
    log: Path,
    progress: Progress,
    threads: int = 1,
    finished: Collection[Path] = (),
) -> None:
    """Do every task once the one that it waits for is finished.

    Args:
        work: a function of a module.
        tasks: to be pickled.
        jobs: processes.
        log: where their messages go.
        progress: of all tasks.
        threads: of each process.
        finished: folders of tasks that were finished before.
    """
    context = get_context("spawn")
    reports: Any = context.Queue()
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(log, threads, reports)
    )  # fmt: skip
    waiting = list(tasks)
    by_folder = {task.folder: task for task in tasks}
    ended = set(finished)
    running: dict[Future[str], Task] = {}
    with pool:
        while waiting or running:
            ready = [task for task in waiting if task.after is None or task.after in ended]
            # no more than can start: a pool finishes what it has taken in, also after Ctrl-C
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(_do, work, task)] = task
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            while not reports.empty():
                folder, cost = reports.get()
                progress.advance(by_folder[folder], cost)
            for future in done:
                task = running.pop(future)
                ended.add(task.folder)
                progress.finish(task, future.result())
            progress.refresh()


_reports: Any = None
"""In a worker: the queue to the parent."""


def _do(work: Work[Task], task: Task) -> str:
    return work(task, lambda cost: _reports.put((task.folder, cost)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_worker(log: Path, threads: int, reports: Any) -> None:
    """Leave Ctrl-C to `finetune`, which saves its state; write messages to a file; end when the parent ends."""
    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(log, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
