"""Results of the self-test: which implementations of an op may be used for a problem on this machine's GPUs.

The ops look here at their first call for a problem, and records name what is in use. A problem is the name of an op
with its dtype and sizes: "attention_out bfloat16 197 64" (fastnull/ops/dispatch.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fastnull.checks import check_choice

SWITCH = "FASTNULL_SELFTEST"
MODES = ("auto", "off", "force")
FORCED = "FASTNULL_KERNELS"
KERNELS = ("triton", "cuda")


@dataclass(frozen=True)
class Outcome:
    """Result of the self-test for one implementation of one problem.

    Attributes:
        ms: milliseconds per call; None if the implementation is not used.
        error: largest error against float64, divided by the largest value.
        floor: lower bound of the time on this machine, divided by `ms`.
        problem: why the implementation is not used; empty if it is correct.
    """

    ms: float | None = None
    error: float | None = None
    floor: float | None = None
    problem: str = ""


Found = Mapping[str, Outcome]
"""Implementation → outcome, for one problem."""

_found: dict[tuple[str, str], Found] = {}  # (name of the GPU, problem) → outcomes
_pinned: dict[str, str] = {}
_used: dict[str, str] = {}
_library_only = False
_listeners: list[Callable[[], None]] = []


def mode(asked: str | None = None) -> str:
    """The mode of the self-test: `asked`, else FASTNULL_SELFTEST, else auto. FASTNULL_SELFTEST=off overrides `asked`.

    Raises:
        ValueError: the mode is not one of MODES.
    """
    value = check_choice(SWITCH, os.environ.get(SWITCH) or "auto", MODES)
    return value if asked is None or value == "off" else check_choice("selftest", asked, MODES)


def forced() -> str:
    """The kernels that FASTNULL_KERNELS forces every op to use, checked or not (for testing them); empty if unset."""
    value = os.environ.get(FORCED)
    return check_choice(FORCED, value, KERNELS) if value else ""


def add(gpu: str, results: Mapping[str, Found]) -> None:
    """Add results for a GPU: problem → outcomes."""
    _found.update({(gpu, problem): outcomes for problem, outcomes in results.items()})
    _changed()


def found(gpu: str, problem: str) -> Found:
    """The outcomes of a problem; empty if it was not checked."""
    return _found.get((gpu, problem), {})


def ranked(gpu: str, problem: str) -> list[str]:
    """The correct implementations for a problem, fastest first; a pinned one comes before all others."""
    right = {name: each.ms for name, each in found(gpu, problem).items() if each.ms is not None}
    return sorted(right, key=lambda name: (name != _pinned.get(problem), right[name]))


def pin(wanted: Mapping[str, str], gpu: str) -> list[str]:
    """Use the implementations of a resumed run, if they are correct on this machine.

    Args:
        wanted: problem → name, from `in_use` in the run that is resumed.
        gpu: name of the GPU.

    Returns:
        For each implementation that cannot be used, a line with the reason.
    """
    _pinned.clear()
    refused = []
    for problem, name in wanted.items():
        outcome = found(gpu, problem).get(name)
        if outcome is not None and outcome.ms is not None:
            _pinned[problem] = name
        elif name != "library":  # the default for unchecked problems
            why = "was not checked here" if outcome is None else outcome.problem
            refused.append(f"{problem}: {name} {why}")
    _changed()
    return refused


def use(problem: str, name: str) -> None:
    """Record that an implementation is used for a problem."""
    _used[problem] = name


def in_use() -> dict[str, str]:
    """Problem → the implementation used for it in this process, on a GPU."""
    return dict(sorted(_used.items()))


def in_records() -> dict[str, dict[str, str]]:
    """`in_use` as an entry of a record; empty if no op ran on a GPU."""
    return {"implementations": in_use()} if _used else {}


def library_only() -> bool:
    """Whether this is inside `library_calls`."""
    return _library_only


@contextmanager
def library_calls() -> Iterator[None]:
    """Inside, ops on a GPU use only library calls and references, no kernel of this package."""
    global _library_only
    before, _library_only = _library_only, True
    try:
        yield
    finally:
        _library_only = before


def on_change(forget: Callable[[], None]) -> None:
    """Register a function to call whenever the choice of implementations may have changed."""
    _listeners.append(forget)


def _changed() -> None:
    _used.clear()  # filled again by later calls
    for forget in _listeners:
        forget()
