"""Runs the child process of the self-test with a time limit: a crash or hang rules out one implementation only."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO, Any

import torch

from fastnull.choices import Found, Outcome

LIMIT = 60.0
"""Time limit in seconds to compile, check and time one implementation of a problem."""
START = 120.0
"""Time limit in seconds for the process to start: import torch and initialise the device."""
CODE = (
    "import json, sys; task = json.load(sys.stdin); sys.path[:] = task['path'];"
    "from fastnull.selftest.child import main; main(task)"
)


def outcomes(
    problems: Sequence[str],
    device: torch.device,
    images: int,
    *,
    tiles: bool = False,
    limit: float = LIMIT,
    module: str = "fastnull.ops.dispatch",
) -> dict[str, Found]:
    """Problem → implementation → outcome. Problems whose references fail are left out, with a warning.

    Args:
        problems: names of the problems, in the order in which they run.
        device: device to run on.
        images: batch size.
        tiles: also try the Triton kernels with other tiles.
        limit: time limit in seconds per implementation.
        module: name of the module that has `implementations`.

    Raises:
        RuntimeError: the process does not start.
    """
    found: dict[str, dict[str, Outcome]] = {name: {} for name in problems}
    failed: set[str] = set()
    while True:
        task = {
            "problems": [name for name in problems if name not in failed],
            "done": {name: {each: asdict(outcome) for each, outcome in of.items()} for name, of in found.items()},
            "device": str(device),
            "images": images,
            "tiles": tiles,
            "limit": limit,
            "module": module,
            "path": sys.path,
            "threads": torch.get_num_threads(),
        }
        lost = _run(task, found)
        if lost is None:
            return {name: of for name, of in found.items() if name not in failed}
        name, implementation, why = lost
        if implementation:
            found[name][implementation] = Outcome(problem=why)
        else:
            failed.add(name)
            warnings.warn(f"fastnull: {name} cannot be checked: {why}", RuntimeWarning, stacklevel=4)


def _run(task: Mapping[str, Any], found: dict[str, dict[str, Outcome]]) -> tuple[str, str, str] | None:
    """Run a process until it ends and collect its outcomes.

    Returns:
        (problem, implementation, reason) if an implementation ended the process, else None.
    """
    current: tuple[str, str] | None = None
    with _process(task) as (process, lines, errors):
        while True:
            try:
                line = lines.get(timeout=task["limit"] if current else max(START, task["limit"]))
            except queue.Empty:
                why = f"did not end within {task['limit']:g} s"
                break
            if line is None:
                why = f"ended its process ({_told(process.wait())})"
                break
            message = json.loads(line)
            if "done" in message:
                return None
            if "begins" in message:
                current = tuple(message["begins"])
            else:
                current = None
                name, implementation, outcome = message["ends"]
                if implementation:
                    found[name][implementation] = Outcome(**outcome)
        if current is None:
            raise RuntimeError(f"the self-test {why}: {_last_line(errors)}")
        return (*current, f"{why}: {_last_line(errors)}" if why.startswith("ended") else why)


@contextmanager
def _process(task: Mapping[str, Any]) -> Iterator[tuple[Any, queue.SimpleQueue[str | None], IO[bytes]]]:
    """The process, the lines that it writes (None after the last), and the file of its standard error."""
    # PYTHONOPTIMIZE would skip the checks
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps(task))
            yield process, lines, errors
        finally:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for its GPU may end late
                process.wait(timeout=5)


def _read(source: Any, lines: queue.SimpleQueue[str | None]) -> None:
    with source:
        for line in source:
            lines.put(line)
    lines.put(None)


def _told(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    text = errors.read().decode(errors="replace").strip()
    return text.splitlines()[-1][:200] if text else "no error output"
