"""Peak memory of a step of universal synthesis, counted by the allocator.

CPU: the running sum of the allocations and releases that torch.profiler records (memory that libraries take for
themselves is not in it); CUDA: torch's own peak counter. The count begins before the step is made, because the
profiler cannot see the release of what is older than itself, and the peak is taken over two steps, so that buffers
kept between steps count, and weight gradients too; not over the making, whose casts are nobody's step.

`without weights` takes off the weights that the count saw being made: the baseline's copy, our folded ones. `with
weights` is what must be there for a step: the baseline's copy alone, but of ours the folded weights and the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import Step, fastnull_step, frozen_step, published_step
from benchmarks.common import Case, Variant, dtypes
from benchmarks.models import make_images, make_model, make_start
from benchmarks.work import ViTShape
from fastnull.bench import BenchSettings, Row
from fastnull.encoder import FrozenEncoder
from fastnull.vit import split

_MARK = "fastnull: two steps"


def cases(settings: BenchSettings) -> Iterator[Case]:
    """Peaks of every model's step, without and with the weights."""
    for name in settings.models:
        model = make_model(name, settings)
        without: dict[tuple[str, torch.dtype], float] = {}
        total: dict[tuple[str, torch.dtype], float] = {}
        for dtype in dtypes(settings):
            for backend, make in _makers(model, settings, dtype).items():
                peak, weights = make()
                without[backend, dtype], total[backend, dtype] = peak, peak + weights
        shape = ViTShape.of(split(model))
        sizes = f"batch {settings.batch}, {shape.N} tokens, width {shape.D}"
        for mode, peaks in (("peak without weights", without), ("peak with weights", total)):
            yield Case(
                "memory", name, mode, sizes, [Variant(b, d) for b, d in peaks], ("frozen", torch.float32), peaks=peaks,
                summary=lambda rows, name=name, mode=mode: _summary(name, mode, rows),
            )  # fmt: skip


def _makers(model: nn.Module, settings: BenchSettings, dtype: torch.dtype) -> dict[str, Callable[[], tuple[int, int]]]:
    """Backend → () → (peak bytes above the weights, bytes of the weights)."""
    images, start = make_images(model, settings.batch, settings), make_start(model, settings)
    itself = sum(p.numel() * p.element_size() for p in model.parameters())
    stored = sum(p.numel() for p in model.parameters()) * dtype.itemsize

    def baseline(make: Callable[..., Step]) -> tuple[int, int]:
        return peak_of(lambda: make(model, images, start, dtype), settings.device) - stored, stored

    def ours() -> tuple[int, int]:
        made: list[FrozenEncoder] = []

        def make() -> Step:
            made.append(FrozenEncoder(model, dtype=dtype))
            return fastnull_step(made[0], images, start)

        peak = peak_of(make, settings.device)
        # the reference backend reports none: it runs the model itself, or a copy where the dtype is another
        copied = made[0].memory()["weights"] or (stored if dtype != next(model.parameters()).dtype else 0)
        return peak - copied, copied + itself

    return {
        "published": lambda: baseline(published_step),
        "frozen": lambda: baseline(frozen_step),
        "fastnull": ours,
    }


def peak_of(make: Callable[[], Callable[[], Any]], device: str) -> int:
    """Most bytes held at once while what `make` returns runs twice, above what was held before `make`."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        run = make()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = make()
        with torch.profiler.record_function(_MARK):
            for _ in range(2):  # no result is kept
                run()
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(e.start_ns() for e in events if e.name() == _MARK)
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, now)
    return peak


def _summary(name: str, mode: str, rows: Sequence[Row]) -> list[str]:
    peaks = {(row.backend, row.dtype): row.mb for row in rows}
    lines = []
    for kind in dict.fromkeys(row.dtype for row in rows):
        mine, theirs = peaks["fastnull", kind], peaks["frozen", kind]
        if mine and theirs:
            lines.append(f"{name} {kind}, {mode}: {mine / theirs:.2f} x that of the frozen model under autograd")
    return lines
