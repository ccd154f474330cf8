"""The child process, which runs the implementations one after the other and reports the outcomes. It may crash.

It writes a line of JSON before ("begins") and after ("ends") each implementation. If the process dies, the
implementation that began and did not end is the cause. fastnull/selftest/supervise.py starts it and reads the lines.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
from dataclasses import asdict
from typing import Any, TextIO

import torch

from fastnull import choices
from fastnull.choices import Outcome
from fastnull.ops.common import register_choices
from fastnull.ops.dispatch import Implementation
from fastnull.selftest.check import Judge, Machine, milliseconds
from fastnull.selftest.problems import Problem

GRACE = 10.0
"""Seconds after the time limit when the process exits by itself, in case the parent is gone."""


def main(task: dict[str, Any]) -> None:
    """Run a task: a dict with problem names, outcomes so far (problem → implementation → outcome), device, images and
    limit. `module` is the name of the module that has `implementations`.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)  # keep compiler output out of the JSON lines
        device = torch.device(task["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
            register_choices()
        else:
            torch.set_num_threads(task["threads"])
        machine = Machine(device)
        for name in task["problems"]:
            done = {each: Outcome(**outcome) for each, outcome in task["done"].get(name, {}).items()}
            _solve(name, done, task, machine, lines)
        _tell(lines, done=True)


def _solve(name: str, done: dict[str, Outcome], task: dict[str, Any], machine: Machine, lines: TextIO) -> None:
    problem, device, images = Problem.named(name), torch.device(task["device"]), task["images"]
    here = importlib.import_module(task["module"]).implementations(problem.op, device, task["tiles"])
    left = [each for each in here if each not in done]
    faulthandler.dump_traceback_later(task["limit"] + GRACE, exit=True)
    if left:
        _tell(lines, begins=[name, ""])
        judge, floor = Judge(problem, images, device), machine.floor(problem, images)
        _tell(lines, ends=[name, "", asdict(Outcome())])
    for each in left:
        faulthandler.dump_traceback_later(task["limit"] + GRACE, exit=True)
        _tell(lines, begins=[name, each])
        outcome = done[each] = _outcome(problem, here[each], judge, images, floor)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises if the context is lost: the process ends, as after a crash
            torch.cuda.empty_cache()
        _tell(lines, ends=[name, each, asdict(outcome)])
    if device.type == "cuda":  # the implementations of later problems may call this op
        choices.add(torch.cuda.get_device_name(device), {name: done})


def _outcome(problem: Problem, implementation: Implementation, judge: Judge, images: int, floor: float) -> Outcome:
    try:
        outcome = judge(implementation)
    except Exception as error:  # compiler, launch or memory error: the implementation is not used
        text = " ".join(str(error).split())
        return Outcome(problem=f"{type(error).__name__}: {text[:200]}")
    if outcome.problem:
        return outcome
    # not caught: after a failed graph capture torch's state is not reliable, so the process ends
    ms = milliseconds(problem, implementation, images, judge.device)
    return Outcome(ms, outcome.error, floor / ms)


def _tell(lines: TextIO, **line: Any) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()
