"""Ctrl-C and SIGTERM: a request that the loop meets between steps."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from fastnull.distributed.processes import Processes
from fastnull.finetune.training import Training


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop meets between steps; a second one interrupts.

    A signal to one process is a request to all, after the same step: `agree` tells them.

    Attributes:
        requested: number of the signal, 0 without one.
    """

    def __init__(self, processes: Processes) -> None:
        self.requested = 0
        self._processes = processes
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = number

    def agree(self) -> None:
        """Fill `requested` with what any process has received; all call this after the same step."""
        self.requested = self._processes.greatest(self._received)

    def leave_if_requested(self, training: Training) -> None:
        """Raise KeyboardInterrupt (SystemExit after SIGTERM) with a line that says how to go on."""
        if not self.requested:
            return
        line = f"stopped after step {training.step} of {training.plan.steps}"
        if training.config.out is not None:
            line += f"; go on with resume=True, out={training.config.out!r} (fastnull finetune: --resume)"
        if self._processes.first:
            print(f"\n{line}", file=sys.stderr)
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(line)
