"""`fastnull bench`: run the suites of benchmarks/, keep their rows, and compare two results.

The suites lie in the source checkout (benchmarks/), which an editable install runs from; comparing needs the package
alone. A run is one JSON file (provenance, ceilings, rows); the rows of all runs are also appended to rows.csv.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastnull import choices
from fastnull.bench.rows import Row, append_rows, read_rows
from fastnull.checks import check_choice, check_device, check_fields, check_number
from fastnull.paths import check_output
from fastnull.record import provenance, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SUITES = ("gemm", "ops", "projection", "encoder", "memory", "synthesis", "finetune")
DTYPES = ("float32", "bfloat16", "float16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class BenchSettings:
    """What a run measures.

    Attributes:
        models: timm names; the shapes of gemm and ops are those of their blocks.
        batch: images a step.
        projected: images that the projection suite projects, 224x224 pixels.
        dtypes: float32, bfloat16 or float16.
        device: torch device.
        threads: of torch; None leaves them.
        seconds: time a case is measured for, at most about; rounds: at least this many, whatever they take.
        compile: measure torch.compile too (it needs a C++ compiler, and about half a minute a model and dtype).
        compile_mode: of torch.compile; `max-autotune` takes minutes a model.
        trained: let the synthesis suite train a digits ViT and measure on that too.
        seed: of data and weights.
    """

    models: tuple[str, ...] = ("vit_base_patch32_224", "vit_small_patch16_224")
    batch: int = 16
    projected: int = 64
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    threads: int | None = None
    seconds: float = 1.0
    rounds: int = 3
    compile: bool = True
    compile_mode: str = "default"
    trained: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for dtype in self.dtypes:
            check_choice("dtype", dtype, DTYPES)
        check_choice("compile_mode", self.compile_mode, COMPILE_MODES)
        for name in ("batch", "projected", "rounds"):
            check_number(name, getattr(self, name), 1)
        check_number("seconds", self.seconds, 0)
        if self.threads is not None:
            check_number("threads", self.threads, 1)

    @classmethod
    def quickly(cls) -> BenchSettings:
        """A look in under two minutes: a small model and batch, no torch.compile. Not for numbers to quote."""
        return cls(models=("vit_tiny_patch16_224",), batch=4, projected=8, compile=False, trained=False)


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastnull bench`; `bench` takes what they parse to."""
    option = parser.add_argument
    option("--quick", action="store_true", help="a first look in less than two minutes; do not quote its numbers")
    option("--only", nargs="+", metavar="SUITE", help=f"any of {', '.join(SUITES)} (default: all)")
    option("--models", nargs="+", metavar="MODEL", help="timm models (default: ViT-B/32 and ViT-S/16)")
    option("--batch", type=int, metavar="N", help="images per step (default: 16, with --quick 4)")
    option("--dtypes", nargs="+", metavar="DTYPE", help="data types (default: float32 bfloat16)")
    option("--device", metavar="DEVICE", help="torch device (default: cuda if there is one, else cpu)")
    option("--threads", type=int, metavar="N", help="threads of torch on the CPU (default: torch's own choice)")
    option("--projected", type=int, metavar="N", help="images of the suite projection (default: 64)")
    option("--seconds", type=float, metavar="S", help="measuring time per case (default: 1)")
    option("--no-compile", action="store_true", help="do not measure torch.compile")
    option("--compile-mode", metavar="MODE", help=f"any of {', '.join(COMPILE_MODES)}")
    option("--selftest", metavar="MODE", help="self-test of the kernels on a GPU: auto (default), off or force")
    option("--out", metavar="FOLDER", help="folder for results (default: benchmarks/results of the checkout)")
    what = "print ratios between two results (.json or .csv) and run nothing"
    option("--compare", nargs=2, metavar=("A", "B"), help=what)
    what = "draw a result (the suites of --only) and run nothing"
    option("--plot", nargs=2, metavar=("RESULT", "FIGURE"), help=what)


def bench(args: argparse.Namespace) -> None:
    """The command: run, compare or draw."""
    if args.compare is not None:
        print(compare(*(read_rows(path) for path in args.compare)))
        return
    if args.plot is not None:
        check_output(args.plot[1], {"RESULT": args.plot[0]}, name="FIGURE")
        from fastnull.bench.plot import plot

        suites = [check_choice("suite", name, SUITES) for name in args.only or SUITES]
        plot([row for row in read_rows(args.plot[0]) if row.suite in suites], args.plot[1])
        print(f"figure: {args.plot[1]}")
        return
    if args.selftest is not None:
        os.environ[choices.SWITCH] = choices.mode(args.selftest)  # of all encoders that the suites make
    check_output(args.out or RESULTS, {}, files=("*.json", "rows.csv"))
    base = BenchSettings.quickly() if args.quick else BenchSettings()
    asked = {
        name: getattr(args, name)
        for name in ("models", "batch", "dtypes", "threads", "projected", "seconds", "compile_mode")
    }
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if v is not None}
    given["device"] = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given["compile"] = base.compile and not args.no_compile
    path = run_bench(BenchSettings(**{**asdict(base), **given}), args.only or SUITES, args.out or RESULTS)
    print(f"results: {path}")


def run_bench(
    settings: BenchSettings, suites: Sequence[str] = SUITES, out: str | Path = RESULTS, *, quiet: bool = False
) -> Path:
    """Run suites, print a table a case, and keep the rows after each case, so that Ctrl-C loses one case at most.

    Args:
        settings: what is measured.
        suites: any of SUITES.
        out: folder for the run's JSON file and for rows.csv, which grows.
        quiet: print nothing.

    Returns:
        The JSON file.

    Raises:
        ValueError: an unknown suite, or no checkout with the suites around this package.
    """
    for name in suites:
        check_choice("suite", name, SUITES)
    common = _suite("common")
    device = check_device(settings.device)
    threads = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        about = provenance(device, threads=torch.get_num_threads(), settings=asdict(settings))
        ceilings = common.measure_ceilings(settings)
        stamp = about["date"].replace(":", "").replace("-", "")
        path = Path(out) / f"{stamp}-{(about['commit'] or 'nocommit').replace('+', '-changed')}.json"
        result: dict[str, Any] = {"provenance": about, "ceilings": ceilings.to_dict(), "summary": [], "rows": []}
        if not quiet:
            print(f"{about['device_name']}; torch {about['torch']}; {ceilings}", flush=True)
        for name in suites:
            for case in _suite(f"bench_{name}").cases(settings):
                rows = common.measure(case, settings, ceilings, about)
                lines = [*case.summary(rows)]
                result["rows"] += [asdict(row) for row in rows]
                result["summary"] += lines
                write_json(path, result)
                append_rows(Path(out) / "rows.csv", rows)
                if not quiet:
                    print("\n".join([common.format_case(case, rows), *lines]), flush=True)
    finally:
        torch.set_num_threads(threads)
    return path


def compare(first: Sequence[Row], second: Sequence[Row]) -> str:
    """A table of the rows that both results have: times, and B / A (below 1: B is faster).

    A ratio whose intervals from p20 to p80 overlap is marked `~`: the two differ by no more than a run's own spread.
    Memory rows compare their peaks. Rows without a time are left out. Differences of machine are reported first.
    """
    ours = {row.key: row for row in first}
    lines = []
    for name in ("device", "torch", "threads"):
        a, b = ({getattr(row, name) for row in rows} for rows in (first, second))
        if a != b:
            lines.append(f"note: {name} differs: {_listed(a)} against {_listed(b)}")
    header = ("suite", "op", "backend", "mode", "dtype", "shape", "A", "B", "B/A")
    table: list[tuple[str, ...]] = [header]
    for row in second:
        mine = ours.get(row.key)
        if mine is None:
            continue
        if row.suite == "memory" and row.mb is not None and mine.mb:
            table.append((*row.key, f"{mine.mb:.1f} MB", f"{row.mb:.1f} MB", f"{row.mb / mine.mb:.2f}"))
        elif row.ms_p50 is not None and mine.ms_p50:
            mark = "~" if _overlap(mine, row) else " "
            table.append(
                (*row.key, f"{mine.ms_p50:.3f} ms", f"{row.ms_p50:.3f} ms", f"{row.ms_p50 / mine.ms_p50:.2f}{mark}")
            )
    if len(table) == 1:
        raise ValueError("the two results have no measured row in common")
    return "\n".join([*lines, format_table(table)])


def format_table(table: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest entry."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def _overlap(a: Row, b: Row) -> bool:
    if None in (a.ms_p20, a.ms_p80, b.ms_p20, b.ms_p80):
        return False
    return a.ms_p20 <= b.ms_p80 and b.ms_p20 <= a.ms_p80  # type: ignore[operator]


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def _suite(name: str) -> Any:
    """A module of benchmarks/ in the checkout around this package."""
    if not (ROOT / "benchmarks" / "common.py").is_file():
        raise ValueError("the benchmark suites are in the source checkout: clone it and install it with pip install -e")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.{name}")
