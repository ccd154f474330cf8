"""Runs the self-test: finds the fastest correct implementation of each of a model's ops on this machine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from fastnull import choices
from fastnull.choices import Found
from fastnull.folder_lock import locked
from fastnull.record import device_name
from fastnull.selftest import store
from fastnull.selftest.problems import OPS, Problem
from fastnull.selftest.supervise import outcomes

IMAGES = {"cuda": 64, "cpu": 2}
"""Default batch size of the self-test. The ranking hardly depends on it."""
KERNELS = ("triton", "cuda", "cpu")
"""Implementations of this package; a warning reports any that fails the self-test."""

_told: set[str] = set()
_tried: set[tuple[str, str]] = set()  # (device, problem) that this process has tried to check


def prove(
    problems: Iterable[Problem],
    device: torch.device,
    *,
    asked: str | None = None,
    images: int | None = None,
    tiles: bool = False,
) -> dict[str, Found]:
    """Check and time all implementations of the problems, and use the fastest correct ones from now on.

    Results stored on this machine by an earlier run are reused.

    Args:
        problems: the problems of an encoder.
        device: device to check on.
        asked: `auto`, `off` (do nothing) or `force` (ignore stored results); None: FASTNULL_SELFTEST.
        images: batch size; None: IMAGES.
        tiles: also try the Triton kernels with other tiles, which takes some minutes.

    Returns:
        Problem → implementation → outcome. Problems that could not be checked are missing; they use library calls.
    """
    mode, name = choices.mode(asked), device_name(device)
    if mode == "off" or choices.forced():
        return {}
    wanted = {each.name: each for problem in problems for each in (problem, *problem.parts)}
    ordered = sorted(wanted, key=lambda each: (OPS.index(wanted[each].op), each))
    known = {} if mode == "force" else store.read(device)
    missing = [each for each in ordered if each not in known and (name, each) not in _tried]
    if missing:
        known |= _checked(missing, device, mode == "force", images or IMAGES[device.type], tiles)
    choices.add(name, {each: known[each] for each in ordered if each in known})
    return {each: choices.found(name, each) for each in ordered if choices.found(name, each)}


def _checked(missing: list[str], device: torch.device, force: bool, images: int, tiles: bool) -> dict[str, Found]:
    """Check the problems that no other process has checked in the meantime, and store the results."""
    name = device_name(device)
    with _alone():
        stored = store.read(device)
        missing = [each for each in missing if force or each not in stored]
        if not missing:
            return stored
        _tried.update((name, each) for each in missing)
        _say(f"checking kernels on {name}, once: {'some minutes' if tiles else 'about half a minute'}")
        try:
            fresh = outcomes(missing, device, images, tiles=tiles)
        except RuntimeError as error:
            _warn(f"kernels cannot be checked on {name}, using library calls instead: {error}")
            return stored
        _tell_what_is_left_out(fresh)
        kept = {each: found for each, found in fresh.items() if not _short_of_memory(found)}
        try:
            store.write(device, stored | kept)
        except (OSError, ValueError) as error:
            _warn(f"results of the self-test cannot be kept, every process will check the kernels again: {error}")
        return stored | fresh


def _short_of_memory(found: Found) -> bool:
    """Whether an implementation ran out of memory: the result may differ in a process with more free GPU memory."""
    return any("OutOfMemoryError" in outcome.problem for outcome in found.values())


@contextmanager
def _alone() -> Iterator[None]:
    """Lock the folder of results: other processes on this machine wait. No lock if the folder cannot be created."""
    try:
        folder = store.folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tried").touch()
    except OSError:  # reported when the results are written
        yield
        return
    with locked(folder, wait=True):
        yield


def _tell_what_is_left_out(found: Mapping[str, Found]) -> None:
    for problem, outcomes_ in found.items():
        for name, outcome in outcomes_.items():
            if outcome.problem and name in KERNELS and not outcome.problem.startswith("does not take"):
                _warn(f"{problem}: the {name} kernel is not used here: {outcome.problem}")


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"fastnull: {text}", file=sys.stderr, flush=True)


def _warn(text: str) -> None:
    if text not in _told:
        _told.add(text)
        warnings.warn(f"fastnull: {text}", RuntimeWarning, stacklevel=2)


def table(found: Mapping[str, Found]) -> list[tuple[str, ...]]:
    """The results as rows of columns, header first; `<` marks the implementation in use."""
    lines: list[tuple[str, ...]] = [("problem", "implementation", "ms", "of floor", "error", "")]
    for problem, outcomes_ in found.items():
        right = {name: each.ms for name, each in outcomes_.items() if each.ms is not None}
        best = min(right, key=lambda name: right[name]) if right else None
        for name, each in outcomes_.items():
            lines.append((
                problem, name,
                "-" if each.ms is None else f"{each.ms:.4f}",
                "-" if each.floor is None else f"{100 * each.floor:.0f} %",
                "-" if each.error is None else f"{each.error:.1e}",
                "<" if name == best else each.problem,
            ))  # fmt: skip
    return lines
