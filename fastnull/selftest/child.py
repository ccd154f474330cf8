"""The process that runs the implementations, one after the other, and says what came of each: it may well crash.

It writes a line of JSON for each implementation before it runs it ("begins") and after it ("ends"). What began and did
not end when the process is gone is what ended it. fastnull/selftest/supervise.py starts it and reads the lines.
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
"""Seconds after the limit at which the process ends itself, where nobody is left to do it."""


def main(task: dict[str, Any]) -> None:
    """Run a task: problems by name, what of them is done (problem → implementation → outcome), device, images, limit.

    `module` names the module whose `implementations` are asked for.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)  # what compilers print is no answer
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
            torch.cuda.synchronize()  # raises where the context is lost: the process ends, as if it had crashed
            torch.cuda.empty_cache()
        _tell(lines, ends=[name, each, asdict(outcome)])
    if device.type == "cuda":  # the implementations of later problems may call this op
        choices.add(torch.cuda.get_device_name(device), {name: done})


def _outcome(problem: Problem, implementation: Implementation, judge: Judge, images: int, floor: float) -> Outcome:
    try:
        outcome = judge(implementation)
    except Exception as error:  # of the compiler, the launch, the memory: the implementation is left out
        text = " ".join(str(error).split())
        return Outcome(problem=f"{type(error).__name__}: {text[:200]}")
    if outcome.problem:
        return outcome
    # an error here ends the process: after a graph that could not be captured torch is not as it was
    ms = milliseconds(problem, implementation, images, judge.device)
    return Outcome(ms, outcome.error, floor / ms)


def _tell(lines: TextIO, **line: Any) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()
