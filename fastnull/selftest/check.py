"""Checks and times an implementation of an op on this machine, for one problem."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnull import testing
from fastnull.choices import Outcome
from fastnull.ops.dispatch import Implementation
from fastnull.ops.linear_gelu import decode_derivative
from fastnull.selftest.problems import Problem

SEEDS = (0, 1)
"""Seeds of the random arguments. Two, since one output may be right by chance, e.g. left over from an earlier call."""
SECONDS = {"cuda": 0.05, "cpu": 0.02}
"""Seconds of timing per implementation."""
CACHES = 3
"""Total size of the arguments of the timed calls, in multiples of the last-level cache."""


class Judge:
    """Checks implementations of a problem; the references are computed once.

    The tolerance is that of fastnull.testing: against float64, twice the error of torch's own operators in the same
    dtype, plus one rounding. For gradients the direction is checked too.
    """

    def __init__(self, problem: Problem, images: int, device: torch.device) -> None:
        self._problem, self._images, self.device = problem, images, device
        self._expected = {}
        for seed in SEEDS:
            exact, own = ([*self._arguments(seed)] for _ in range(2))
            exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in exact]
            problem.reference()(*exact)
            problem.torchs_own()(*own)
            self._expected[seed] = (problem.written(tuple(exact)), problem.written(tuple(own)))

    def __call__(self, implementation: Implementation) -> Outcome:
        """The outcome, without a time. Exceptions of the implementation are not caught."""
        if not implementation.serves(*self._arguments(SEEDS[0])):
            return Outcome(problem="does not take this problem here")
        worst = 0.0
        for seed, (exact, own) in self._expected.items():
            first, again = (self._results(implementation, seed) for _ in range(2))
            for result, reference, baseline in zip(first, exact, own, strict=True):
                try:
                    worst = max(worst, self._error(result, reference, baseline))
                except AssertionError as wrong:
                    return Outcome(problem=f"wrong: {wrong}")
            if not all(a.equal(b) for a, b in zip(first, again, strict=True)):
                return Outcome(problem="gives other bits when it runs again")
        return Outcome(error=worst)

    def _arguments(self, seed: int) -> tuple[Any, ...]:
        return self._problem.arguments(self._images, seed, self.device)

    def _results(self, implementation: Implementation, seed: int) -> list[Tensor]:
        arguments = self._arguments(seed)
        with testing.poisoned():
            implementation.run(*arguments)
        return self._problem.written(arguments)

    def _error(self, result: Tensor, reference: Tensor, baseline: Tensor) -> float:
        """Largest error divided by the largest value. Raises AssertionError if it is too large."""
        name = self._problem.op
        if result.dtype == torch.uint8:  # stored derivatives: an error of one code is a rounding
            result, reference, baseline = (decode_derivative(x, torch.float64) for x in (result, reference, baseline))
            step = float(decode_derivative(torch.ones(1, dtype=torch.uint8)) - decode_derivative(torch.zeros(1).byte()))
            error, allowed = ((x - reference).abs().max().item() for x in (result, baseline))
            assert error <= 2 * (allowed + step), f"{name}: kept derivative is off by {error:.3g}"
        elif not result.is_floating_point():
            assert result.equal(reference), f"{name}: {result.dtype} values differ"
        else:
            # q, k and v separately: the gradient of one may be far smaller than that of another
            parts = zip(*(x.unbind(2) if x.ndim == 5 else (x,) for x in (result, reference, baseline)), strict=True)
            check = testing.assert_gradient_close if self._problem.is_gradient else testing.assert_within_budget
            for a, b, c in parts:
                check(a, b, c, name)
        return float((result.double() - reference).abs().max() / reference.double().abs().max().clamp_min(1e-300))


def milliseconds(problem: Problem, implementation: Implementation, images: int, device: torch.device) -> float:
    """Median milliseconds per call, with arguments larger than the caches; on a GPU in a CUDA graph, as in synthesis.

    Raises:
        RuntimeError: the call cannot be captured in a CUDA graph.
    """
    first = problem.arguments(images, 0, device)
    copies = _copies(problem.bytes(first), device)
    sets = [first, *(problem.arguments(images, seed, device) for seed in range(1, copies))]
    calls = [functools.partial(implementation.run, *arguments) for arguments in sets]
    return (_graph_time if device.type == "cuda" else _wall_time)(calls)


def _copies(size: float, device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, int(CACHES * cache / max(size, 1)) + 1))


def _graph_time(calls: Sequence[Callable[[], object]]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times: list[float] = []
        end = time.perf_counter() + SECONDS["cuda"]
        while len(times) < 5 or time.perf_counter() < end:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(times)


def _wall_time(calls: Sequence[Callable[[], object]]) -> float:
    times: list[float] = []
    end = time.perf_counter() + SECONDS["cpu"]
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(1e3 * (time.perf_counter() - start) / len(calls))
    return statistics.median(times)


class Machine:
    """Rates of matrix products and copies on this device, measured once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._timed = _graph_time if device.type == "cuda" else _wall_time

    def floor(self, problem: Problem, images: int) -> float:
        """Lower bound in milliseconds: the time for the FLOPs, or to move the arguments once, whichever is longer."""
        arguments = problem.arguments(images, 0, self.device)
        flop = problem.flop(arguments)
        return max(flop / self._rate(problem.signature[0]) if flop else 0.0, problem.bytes(arguments) / self._bandwidth)

    @functools.cache  # noqa: B019 - the process is short-lived
    def _rate(self, dtype: torch.dtype) -> float:
        """FLOPs per millisecond of a large matrix product."""
        side = 4096 if self.device.type == "cuda" else 256
        a, b, out = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(3))
        return 2 * side**3 / self._timed([lambda: torch.mm(a, b, out=out)])

    @functools.cached_property
    def _bandwidth(self) -> float:
        """Bytes read and written per millisecond by a large copy."""
        size = 2**28 if self.device.type == "cuda" else 2**22
        source = torch.zeros(size, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        return 8 * size / self._timed([lambda: target.copy_(source)])
