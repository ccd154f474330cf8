"""Runs tasks in several processes, which end with their parent, and shows one progress bar for all of them."""

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
    """A task with its own folder. It may have to wait for tasks of other folders."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def after(self) -> Collection[Path]: ...

    @property
    def cost(self) -> float: ...


Task = TypeVar("Task", bound=Ordered)
Work = Callable[[Task, Callable[[float], None]], str]
"""Runs a task and returns a line with its results; reports the cost of finished work to its second argument."""


class Progress:
    """A progress bar in units of task cost.

    Args:
        bar: a bar of `progress_bar`; its total is the cost of all tasks.
        total: number of tasks.
        done: number of tasks that are finished already.
    """

    def __init__(self, bar: Any, total: int, done: int) -> None:
        self._bar, self._total, self._done = bar, total, done
        self._seen: dict[Path, float] = {}

    def begin(self, task: Ordered) -> None:
        """Show the name of the running task."""
        self._bar.set_description(f"{self._done}/{self._total} runs; {task.name}", refresh=watched())

    def advance(self, task: Ordered, cost: float) -> None:
        """Add finished work of a task, at most its cost (which is an estimate)."""
        before = self._seen.get(task.folder, 0.0)
        self._seen[task.folder] = min(task.cost, before + cost)
        self._bar.update(self._seen[task.folder] - before)

    def finish(self, task: Ordered, line: str) -> None:
        """Show the line of a finished task above the bar, and add the rest of its cost."""
        if not self._bar.disable:
            self._bar.write(line)
        self.advance(task, task.cost)
        self._done += 1
        self._bar.set_description(f"{self._done}/{self._total} runs", refresh=watched())

    def refresh(self) -> None:
        """Update the elapsed time of a bar on a terminal."""
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
    """Run all tasks; each starts when the tasks that it waits for are finished.

    Args:
        work: a function at the top level of a module, so that it can be pickled.
        tasks: the tasks, which are pickled.
        jobs: number of processes.
        log: file for the messages of the processes.
        progress: progress bar for all tasks.
        threads: number of threads of each process.
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
            ready = [task for task in waiting if ended.issuperset(task.after)]
            # submit only tasks that can start now: a pool runs all submitted tasks, even after Ctrl-C
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
"""Queue to the parent, in a worker."""


def _do(work: Work[Task], task: Task) -> str:
    return work(task, lambda cost: _reports.put((task.folder, cost)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_worker(log: Path, threads: int, reports: Any) -> None:
    """Ignore Ctrl-C until `finetune` handles it and saves its state; write messages to a file; end with the parent."""
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
