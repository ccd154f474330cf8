"""Tasks in processes of one thread each, which leave nothing behind when the parent ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fastnull.progress import watched


class Ordered(Protocol):
    """A task with a folder of its own, that may have to wait for another one's."""

    @property
    def folder(self) -> Path: ...

    @property
    def after(self) -> Path | None: ...


Task = TypeVar("Task", bound=Ordered)


def run_in_processes(work: Callable[[Task], str], tasks: Sequence[Task], jobs: int, log: Path, bar: Any) -> None:
    """Do every task once the one that it waits for is done.

    Args:
        work: a function of a module; returns the line that says what came out.
        tasks: to be pickled.
        jobs: processes.
        log: where their messages go.
        bar: advances by one for each task that is done.
    """
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(log,))
    waiting = list(tasks)
    finished: set[Path] = set()
    running: dict[Future[str], Task] = {}
    with pool:
        while waiting or running:
            ready = [task for task in waiting if task.after is None or task.after in finished]
            # no more than can start: what a pool has taken in runs to its end, also after Ctrl-C
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(work, task)] = task
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                finished.add(running.pop(future).folder)
                report_done(bar, future.result())
            if watched():
                bar.refresh()  # its clock goes on


def report_done(bar: Any, line: str) -> None:
    """Show a line above the bar, and advance it by one."""
    if not bar.disable:
        bar.write(line)
    bar.update()


@contextmanager
def one_thread() -> Iterator[None]:
    """Small models are too small for two threads, which would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
