"""Common parts of all suites: cases and their variants, the correctness gate, interleaved timing, ceilings, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.work import Work
from fastnull.bench import BenchSettings, Row, format_table
from fastnull.testing import COSINE_MARGIN

LIMIT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""The error that no variant may exceed, torch's own included: far above rounding, far below a wrong result."""
AGAIN = " (again)"
FAILED = "FAILED: "
MAX_ROUNDS = 1000
QUEUED = 2
"""Rounds that a GPU has to go on with while the host waits for the one before them."""
WARM_UP = 0.2
"""Seconds that a variant runs before it is timed, on a GPU; clocks and caches settle by time, not by count."""


T = TypeVar("T")
Prepared = tuple[Callable[[int], Any], int]
"""What to time, by index of the inputs, and how many calls one run of it is."""


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case.

    Attributes:
        backend: who computes: `fastnull`, or a baseline by name.
        dtype: of its tensors.
        call: (index of the inputs) → the result, or None where nothing comparable comes out.
        library: torch's own path, whose error is the budget of the others in its dtype.
        check: gives the result that is judged, where that is not call(0).
        graph: whether a CUDA graph can capture the call.
        twice: time it a second time, so that the table shows the noise floor.
        work: where it is not the case's own.
        skip: why it cannot run here.
        note: for its row.
    """

    backend: str
    dtype: torch.dtype
    call: Callable[[int], Tensor | None] = lambda index: None
    library: bool = False
    check: Callable[[], Tensor | None] | None = None
    graph: bool = False
    twice: bool = False
    work: Work | None = None
    skip: str = ""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Variants that do the same work on the same data.

    Attributes:
        suite, op, mode, shape: for its rows.
        variants: to measure; (backend, dtype) tells them apart.
        baseline: (backend, dtype) that the table's speed-ups refer to.
        reference: gives the float64 result, or None where variants judge themselves (`judge`) or nothing is judged.
        work: dtype → what the task needs.
        copies: sets of inputs that calls rotate through.
        judge: (variant, result) → (error, what is wrong or "") in place of the comparison with the reference.
        summary: rows → lines to print and keep.
        peaks: what was measured as bytes in place of time: (backend, dtype) → bytes.
        rounds: for work that takes minutes: exactly so many; None: the settings'.
    """

    suite: str
    op: str
    mode: str
    shape: str
    variants: Sequence[Variant]
    baseline: tuple[str, torch.dtype]
    reference: Callable[[], Tensor] | None = None
    work: Callable[[torch.dtype], Work] = lambda dtype: Work()
    copies: int = 1
    judge: Callable[[Variant, Tensor], tuple[float | None, str]] | None = None
    summary: Callable[[Sequence[Row]], list[str]] = lambda rows: []
    peaks: Mapping[tuple[str, torch.dtype], float] = field(default_factory=dict)
    rounds: int | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run.

    Attributes:
        flops: dtype → operations a second of a large product.
        bandwidth: bytes read and written a second of a large copy.
    """

    flops: Mapping[torch.dtype, float]
    bandwidth: float

    def floor_ms(self, work: Work, dtype: torch.dtype) -> float:
        """The least time for the work. A 16-bit result may be computed in float32 where that is faster."""
        allowed = [rate for kind, rate in self.flops.items() if kind.itemsize >= dtype.itemsize]
        return 1e3 * max(work.flop / max(allowed), work.bytes / self.bandwidth)

    def to_dict(self) -> dict[str, float]:
        """As JSON: GFLOP/s by dtype, and GB/s."""
        return {**{name_of(k): v / 1e9 for k, v in self.flops.items()}, "copy_gb_s": self.bandwidth / 1e9}

    def __str__(self) -> str:
        rates = ", ".join(f"{name_of(k)} {v / 1e9:.0f} GFLOP/s" for k, v in self.flops.items())
        return f"ceilings: {rates}, copy {self.bandwidth / 1e9:.1f} GB/s"


class CpuTimer:
    """Wall time."""

    def prepare(self, variant: Variant, copies: int) -> Prepared:
        """What to time. Judging has called it already, unless by `check`."""
        if variant.check is not None:
            variant.call(0)
        return variant.call, 1

    def start(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Run it; what is returned gives its milliseconds."""
        begin = time.perf_counter()
        run()
        elapsed = 1e3 * (time.perf_counter() - begin)
        return lambda: elapsed


class CudaTimer:
    """Device events. Capturable calls are replayed as one graph over all input copies, so that no launch is timed."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda  # tests give a fake

    def prepare(self, variant: Variant, copies: int) -> Prepared:
        """What to time: the call, or a graph of all sets of inputs."""
        end = time.perf_counter() + WARM_UP
        while True:
            for index in range(copies):
                variant.call(index)
            self._cuda.synchronize()
            if time.perf_counter() >= end:
                break
        if not variant.graph:
            return variant.call, 1
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            for index in range(copies):
                variant.call(index)
        return lambda index: graph.replay(), copies

    def start(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Enqueue it between two events; what is returned waits and gives its milliseconds."""
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()

        def read() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end))

        return read


def timer_for(device: str) -> CpuTimer | CudaTimer:
    """The timer of a device."""
    return CudaTimer() if torch.device(device).type == "cuda" else CpuTimer()


def attempt(work: Callable[[], T], device: str) -> tuple[T | None, str]:
    """The result of `work`, or None and why it failed: one baseline out of memory must not take the others with it."""
    try:
        return work(), ""
    except Exception as error:
        problem = f"{FAILED}{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # here, where the traceback holds no tensor any more
    return None, problem


def interleaved(
    prepared: Sequence[Prepared], copies: int, seconds: float, rounds: int, timer: CpuTimer | CudaTimer
) -> list[list[float]]:
    """Milliseconds of each, round by round: every round runs all, beginning with another one.

    On a GPU the host is at most QUEUED rounds ahead, so that `seconds` limits the running and not the launching.
    """
    readers: list[list[Callable[[], float]]] = [[] for _ in prepared]
    times: list[list[float]] = [[] for _ in prepared]
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < seconds:
        for place in range(len(prepared)):
            chosen = (place + done) % len(prepared)
            run, _ = prepared[chosen]
            readers[chosen].append(timer.start(lambda run=run, index=done % copies: run(index)))
        if done >= QUEUED:
            for column, unread in zip(times, readers, strict=True):
                column.append(unread.pop(0)())
        done += 1
        if done >= max(rounds, MAX_ROUNDS):
            break
    for column, unread, (_, calls) in zip(times, readers, prepared, strict=True):
        column += [read() for read in unread]
        column[:] = [value / calls for value in column]
    return times


def measure(case: Case, settings: BenchSettings, ceilings: Ceilings, about: Mapping[str, Any]) -> list[Row]:
    """Judge every variant, then time those that are right; a row each."""
    verdicts = judged(case, settings.device)
    right = [v for v in case.variants if not v.skip and not verdicts[v.backend, v.dtype][1]]
    twins = [replace(v, backend=v.backend + AGAIN) for v in right if v.twice]
    ready: dict[tuple[str, torch.dtype], Prepared] = {}
    unready: dict[tuple[str, torch.dtype], str] = {}
    timer = timer_for(settings.device)
    for v in [] if case.peaks else [*right, *twins]:
        prepared, unready[v.backend, v.dtype] = attempt(lambda v=v: timer.prepare(v, case.copies), settings.device)
        if prepared is not None:
            ready[v.backend, v.dtype] = prepared
    times: dict[tuple[str, torch.dtype], list[float]] = {}
    if ready:
        seconds, rounds = (settings.seconds, settings.rounds) if case.rounds is None else (0.0, case.rounds)
        columns = interleaved([*ready.values()], case.copies, seconds, rounds, timer)
        times = dict(zip(ready, columns, strict=True))
    where = {name: about[name] for name in ("date", "commit", "torch", "triton", "threads")}
    rows = []
    for v in [*case.variants, *twins]:
        error, wrong = verdicts[v.backend.removesuffix(AGAIN), v.dtype]
        row = Row(
            **where, device=about["device_name"], suite=case.suite, op=case.op, backend=v.backend, mode=case.mode,
            dtype=name_of(v.dtype), shape=case.shape, max_err=error,
            note=f"skipped: {v.skip}" if v.skip else wrong or unready.get((v.backend, v.dtype)) or v.note,
        )  # fmt: skip
        peak = case.peaks.get((v.backend, v.dtype))
        if peak is not None:
            row = replace(row, mb=peak / 1e6)
        elif (v.backend, v.dtype) in times:
            row = _with_times(row, times[v.backend, v.dtype], v.work or case.work(v.dtype), v.dtype, ceilings)
        rows.append(row)
    return rows


def _with_times(row: Row, times: Sequence[float], work: Work, dtype: torch.dtype, ceilings: Ceilings) -> Row:
    p20, p50, p80 = percentiles(times)
    floor = ceilings.floor_ms(work, dtype)
    if not floor:
        return replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80)
    return replace(
        row, ms_p50=p50, ms_p20=p20, ms_p80=p80, gflop=work.flop / 1e9, mb=work.bytes / 1e6, floor_ms=floor,
        floor_fraction=floor / p50,
    )  # fmt: skip


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def judged(case: Case, device: str = "cpu") -> dict[tuple[str, torch.dtype], tuple[float | None, str]]:
    """(backend, dtype) → the error, and what is wrong with the result, or why there is none (empty where all is well).

    Against float64 a variant may err twice as much as torch's own path in its dtype, plus a rounding, in its largest
    error; the cosine may be off four times as much (it goes with the square). Nothing may exceed LIMIT.
    """
    reference = None if case.reference is None else case.reference()
    found: dict[tuple[str, torch.dtype], tuple[float | None, str]] = {}
    budgets: dict[torch.dtype, tuple[float, float]] = {}
    for variant in sorted(case.variants, key=lambda v: not v.library):
        key = (variant.backend, variant.dtype)
        found[key] = (None, "")
        if variant.skip:
            continue
        result, failure = attempt(variant.check or (lambda variant=variant: variant.call(0)), device)
        if failure:
            found[key] = (None, failure)
        elif case.judge is not None and result is not None:
            error_of, text = case.judge(variant, result)
            found[key] = (error_of, text and f"WRONG: {text}")
        elif reference is not None and result is not None:
            error, off = deviation(result, reference)
            eps, margin = torch.finfo(variant.dtype).eps, COSINE_MARGIN[variant.dtype]
            allowed, allowed_off = budgets.get(variant.dtype, (LIMIT[variant.dtype], LIMIT[variant.dtype]))
            wrong = ""
            if not (error <= allowed and off <= allowed_off):
                wrong = (
                    f"WRONG: error {error:.3g} (allowed {allowed:.3g}), "
                    f"cosine 1 - {off:.3g} (allowed {allowed_off:.3g})"
                )
            elif variant.library and variant.dtype not in budgets:
                budgets[variant.dtype] = (min(allowed, 2 * (error + eps)), max(margin, 4 * off))
            found[key] = (error if error == error else None, wrong)  # NaN is no JSON
    return found


def deviation(result: Tensor, reference: Tensor) -> tuple[float, float]:
    """Largest error over the reference's largest magnitude, and 1 − cosine; NaN where the result is not finite."""
    if result.shape != reference.shape or not bool(torch.isfinite(result).all()):
        return float("nan"), float("nan")
    a, b = result.detach().to(reference.device, torch.float64), reference.detach()
    error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
    return error, 1 - float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def measure_ceilings(settings: BenchSettings) -> Ceilings:
    """Time a large product in each dtype and a large copy."""
    cuda = torch.device(settings.device).type == "cuda"
    # on a GPU far more than its caches hold, however short the look
    side = 8192 if cuda else 2048 if settings.seconds >= 1 else 512
    size = 2**30 if cuda else 2**28 if settings.seconds >= 1 else 2**24
    kinds = dict.fromkeys([torch.float32, *dtypes(settings)])
    source = torch.Generator(settings.device).manual_seed(settings.seed)
    made = {"generator": source, "device": settings.device}
    variants = []
    for kind in kinds:
        a, b = (torch.randn(side, side, **made).to(kind) for _ in range(2))
        out = torch.empty_like(a)
        variants.append(Variant("gemm", kind, lambda index, a=a, b=b, out=out: torch.mm(a, b, out=out)))
    x = torch.rand(size // 4, **made)
    y = torch.empty_like(x)
    variants.append(Variant("copy", torch.uint8, lambda index: y.copy_(x)))
    timer = timer_for(settings.device)
    prepared = [timer.prepare(variant, 1) for variant in variants]
    columns = interleaved(prepared, 1, min(settings.seconds, 10) / 4, settings.rounds, timer)
    # the best and not the median: a ceiling is what the machine can do
    best = [min(column) / 1e3 for column in columns]
    return Ceilings({k: 2 * side**3 / t for k, t in zip(kinds, best, strict=False)}, 2 * size / best[-1])


def format_case(case: Case, rows: Iterable[Row]) -> str:
    """A table: time and spread, fraction of the floor, error, and speed-up over the baseline (none for a wrong row)."""
    rows = list(rows)
    backend, dtype = case.baseline
    base = next((r.ms_p50 for r in rows if (r.backend, r.dtype) == (backend, name_of(dtype))), None)
    table: list[tuple[str, ...]] = [
        ("backend", "dtype", "ms p50", "p20", "p80", "of floor", "error", f"x {backend} {name_of(dtype)}", "note")
    ]
    for r in rows:
        timed = [f"{value:.3f}" if value is not None else "-" for value in (r.ms_p50, r.ms_p20, r.ms_p80)]
        if r.suite == "memory" and r.mb is not None:
            timed[0] = f"{r.mb:.1f} MB"
        fraction = f"{100 * r.floor_fraction:.0f} %" if r.floor_fraction else "-"
        ratio = f"{base / r.ms_p50:.2f}" if base and r.ms_p50 else "-"
        error = f"{r.max_err:.1e}" if r.max_err is not None else "-"
        table.append((r.backend, r.dtype, *timed, fraction, error, ratio, r.note))
    return f"\n{case.suite}: {case.op} {case.mode} {case.shape}\n{format_table(table)}"


def dtypes(settings: BenchSettings) -> list[torch.dtype]:
    """The dtypes asked for."""
    return [getattr(torch, name) for name in settings.dtypes]


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def copies_for(nbytes: float, device: str) -> int:
    """Sets of inputs that exceed the last-level cache three times on a GPU; two on a CPU, whose caches are shared."""
    if torch.device(device).type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, int(3 * cache / max(nbytes, 1)) + 1))


def ratio(rows: Sequence[Row], above: tuple[str, str], below: tuple[str, str]) -> float | None:
    """Time of one (backend, dtype) over that of another; None where one of them has no time."""
    times = {(row.backend, row.dtype): row.ms_p50 for row in rows}
    a, b = times.get(above), times.get(below)
    return a / b if a and b else None
