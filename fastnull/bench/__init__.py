"""Benchmarks: run the suites of benchmarks/, keep their rows, compare and plot results (`fastnull bench`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.bench.rows import Row, append_rows, read_rows
    from fastnull.bench.run import BenchSettings, add_bench_options, bench, compare, format_table, run_bench
else:
    __getattr__, __dir__ = lazy_names(__name__, "fastnull.bench.rows", "fastnull.bench.run")

__all__ = [
    "BenchSettings",
    "Row",
    "add_bench_options",
    "append_rows",
    "bench",
    "compare",
    "format_table",
    "read_rows",
    "run_bench",
]
