"""Ctrl-C and SIGTERM stop a run between two steps."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from fastnull.distributed.processes import Processes
from fastnull.finetune.training import Training


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop between steps; a second one interrupts at once.

    `agree` makes a signal to one process a request to all processes after the same step.

    Attributes:
        requested: number of the signal; 0: none.
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
        """Set `requested` to the signal that any process received. All must call this after the same step."""
        self.requested = self._processes.greatest(self._received)

    def leave_if_requested(self, training: Training) -> None:
        """Raise KeyboardInterrupt (SystemExit after SIGTERM) with a message about how to resume."""
        if not self.requested:
            return
        line = f"stopped after step {training.step} of {training.plan.steps}"
        if training.config.out is not None:
            line += f"; resume with resume=True, out={training.config.out!r} (fastnull finetune: --resume)"
        if self._processes.first:
            print(f"\n{line}", file=sys.stderr)
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(line)
