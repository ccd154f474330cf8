"""Which implementation of an op may serve which problem on this machine's GPUs: what the self-test found.

Plain data: the ops look here at their first call for a problem, and records name what is in use. A problem is an op
with what decides about its speed, as text: "attention_out bfloat16 197 64" (fastnull/ops/dispatch.py).
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
    """What the self-test found of one implementation of one problem.

    Attributes:
        ms: of one call; None where it is left out.
        error: largest error against float64, over the largest value.
        floor: the least time that the machine needs for the problem, over `ms`.
        problem: why it is left out; empty where it is right.
    """

    ms: float | None = None
    error: float | None = None
    floor: float | None = None
    problem: str = ""


Found = Mapping[str, Outcome]
"""Implementation → outcome, of one problem."""

_found: dict[tuple[str, str], Found] = {}  # (name of the GPU, problem) → outcomes
_pinned: dict[str, str] = {}
_used: dict[str, str] = {}
_library_only = False
_listeners: list[Callable[[], None]] = []


def mode(asked: str | None = None) -> str:
    """`asked`, else what FASTNULL_SELFTEST says, else auto; off where FASTNULL_SELFTEST says so, whatever is asked.

    Raises:
        ValueError: it is none of MODES.
    """
    value = check_choice(SWITCH, os.environ.get(SWITCH) or "auto", MODES)
    return value if asked is None or value == "off" else check_choice("selftest", asked, MODES)


def forced() -> str:
    """The kernels that FASTNULL_KERNELS makes every op run, proven or not (for tests of the kernels); empty: none."""
    value = os.environ.get(FORCED)
    return check_choice(FORCED, value, KERNELS) if value else ""


def add(gpu: str, results: Mapping[str, Found]) -> None:
    """Take over results of a GPU: problem → outcomes."""
    _found.update({(gpu, problem): outcomes for problem, outcomes in results.items()})
    _changed()


def found(gpu: str, problem: str) -> Found:
    """What is known of a problem; empty where nothing is."""
    return _found.get((gpu, problem), {})


def ranked(gpu: str, problem: str) -> list[str]:
    """The implementations that are right for a problem, fastest first; one that a resumed run asks for before them."""
    right = {name: each.ms for name, each in found(gpu, problem).items() if each.ms is not None}
    return sorted(right, key=lambda name: (name != _pinned.get(problem), right[name]))


def pin(wanted: Mapping[str, str], gpu: str) -> list[str]:
    """From now on take these implementations, problem → name, where they are right here; where not, why, a line each.

    Args:
        wanted: what `in_use` said in the run that is resumed.
        gpu: name of the GPU that the run goes on with.
    """
    _pinned.clear()
    refused = []
    for problem, name in wanted.items():
        outcome = found(gpu, problem).get(name)
        if outcome is not None and outcome.ms is not None:
            _pinned[problem] = name
        elif name != "library":  # which is what an unproven problem gets anyway
            why = "was not checked here" if outcome is None else outcome.problem
            refused.append(f"{problem}: {name} {why}")
    _changed()
    return refused


def use(problem: str, name: str) -> None:
    """Note that an implementation serves a problem."""
    _used[problem] = name


def in_use() -> dict[str, str]:
    """Problem → the implementation that served it in this process, on a GPU."""
    return dict(sorted(_used.items()))


def in_records() -> dict[str, dict[str, str]]:
    """`in_use` as an entry of a record; none where nothing ran on a GPU."""
    return {"implementations": in_use()} if _used else {}


def library_only() -> bool:
    """Whether this is inside `library_calls`."""
    return _library_only


@contextmanager
def library_calls() -> Iterator[None]:
    """Inside, ops on a GPU take library calls and references alone: never a kernel of this package."""
    global _library_only
    before, _library_only = _library_only, True
    try:
        yield
    finally:
        _library_only = before


def on_change(forget: Callable[[], None]) -> None:
    """Have `forget` called whenever another implementation may be chosen than before."""
    _listeners.append(forget)


def _changed() -> None:
    _used.clear()  # what is used from now on says so again
    for forget in _listeners:
        forget()
