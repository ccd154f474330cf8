"""The benchmark suite at tiny sizes: that it runs, keeps what it measured, and prints no speed-up for a wrong result.

Nothing here asserts a speed. vit_digits (17 tokens, width 32, 4 blocks) takes every path that a real ViT does.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnull import _C
from fastnull.bench import BenchSettings, Row, append_rows, compare, read_rows, run_bench
from fastnull.bench import run as bench
from fastnull.bench.rows import COLUMNS
from fastnull.bench.run import SUITES
from fastnull.vit import split

TINY = BenchSettings(models=("vit_digits",), batch=4, projected=2, seconds=0.0, rounds=2, compile=False, trained=False)
common: Any = bench._suite("common")
baselines: Any = bench._suite("baselines")
models: Any = bench._suite("models")
work: Any = bench._suite("work")
memory: Any = bench._suite("bench_memory")
encoder_suite: Any = bench._suite("bench_encoder")
ops_suite: Any = bench._suite("bench_ops")
attention: Any = bench._suite("attention")
finetune_suite: Any = bench._suite("bench_finetune")
synthesis_suite: Any = bench._suite("bench_synthesis")


def row(**changes: Any) -> Row:
    """A complete row."""
    base = Row(
        date="2026-01-01T00:00:00Z", commit="abc", device="cpu", torch="2", triton=None, threads=2, suite="ops",
        op="op", backend="fastnull", mode="call", dtype="float32", shape="[1]", ms_p50=2.0, ms_p20=1.9, ms_p80=2.1,
    )  # fmt: skip
    return replace(base, **changes)


def variant(backend: str, result: Tensor | None, **changes: Any) -> Any:
    """A variant that returns `result`."""
    return common.Variant(backend, torch.float32, lambda index: result, **changes)


def case(*variants: Any, reference: Tensor | None = None, **changes: Any) -> Any:
    """A case of the variants; the first is the baseline."""
    return common.Case(
        "ops", "op", "call", "[1]", variants, (variants[0].backend, torch.float32),
        reference=None if reference is None else lambda: reference, **changes,
    )  # fmt: skip


def measured(given: Any) -> list[Row]:
    """Rows of a case on made-up ceilings."""
    ceilings = common.Ceilings({torch.float32: 1e9}, 1e9)
    about = {"date": "d", "commit": "c", "torch": "t", "triton": None, "threads": 1, "device_name": "n"}
    return common.measure(given, TINY, ceilings, about)


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_runs_and_every_result_is_right(suite: str, tmp_path: Path) -> None:
    path = run_bench(TINY, [suite], tmp_path, quiet=True)
    result = json.loads(path.read_text())
    rows = [Row(**entry) for entry in result["rows"]]
    assert rows
    assert not [r for r in rows if r.note.startswith(("WRONG", common.FAILED))]
    for r in rows:
        if r.suite == "memory":
            assert r.mb is not None
            assert r.mb > 0
        elif not r.note.startswith("skipped"):
            assert r.ms_p50 is not None
            assert 0 < r.ms_p20 <= r.ms_p50 <= r.ms_p80  # type: ignore[operator]
    assert {"commit", "torch", "device_name", "settings"} <= set(result["provenance"])
    assert set(result["ceilings"]) == {"float32", "bfloat16", "copy_gb_s"}


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    for _ in range(2):
        append_rows(tmp_path / "rows.csv", [row()])
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == 3
    assert COLUMNS[:2] == ("date", "commit")
    assert COLUMNS[-1] == "note"


def test_rows_of_another_version_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("date,other\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        append_rows(tmp_path / "rows.csv", [row()])
    assert (tmp_path / "rows.csv").read_text() == "date,other\n1,2\n"


def test_csv_and_json_read_back_the_same(tmp_path: Path) -> None:
    rows = [row(), row(op="other", ms_p50=None, ms_p20=None, ms_p80=None, note='skipped: a "quoted", one', commit=None)]
    append_rows(tmp_path / "rows.csv", rows)
    (tmp_path / "run.json").write_text(json.dumps({"rows": [asdict(r) for r in rows]}))
    assert read_rows(tmp_path / "rows.csv") == rows == read_rows(tmp_path / "run.json")
    append_rows(tmp_path / "rows.csv", [row(ms_p50=3.0)])  # of equal keys the last row counts
    assert read_rows(tmp_path / "rows.csv") == [row(ms_p50=3.0), rows[1]]


@pytest.mark.parametrize("text", ["", "not json", '{"rows": [{"date": 1}]}', "[]"])
def test_what_is_no_result_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="no result of fastnull bench"):
        read_rows(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "missing.json")


def test_compare_prints_b_over_a_and_marks_what_lies_within_the_spread() -> None:
    first = [row(), row(op="near"), row(op="gone"), row(op="untimed", ms_p50=None)]
    faster, near = row(ms_p50=1.0, ms_p20=0.9, ms_p80=1.1), row(op="near", ms_p50=2.1, ms_p20=2.0, ms_p80=2.2)
    second = [faster, near, row(op="new"), row(op="untimed")]
    lines = compare(first, second).splitlines()
    assert len(lines) == 3  # header, and the two that both have
    assert lines[1].split()[-1] == "0.50"
    assert lines[2].split()[-1] == "1.05~"


def test_compare_matches_backend_dtype_and_shape() -> None:
    for name in ("backend", "dtype", "shape", "mode"):
        with pytest.raises(ValueError, match="in common"):
            compare([row()], [row(**{name: "another"})])


def test_compare_tells_another_machine_and_compares_peaks_of_memory() -> None:
    a = row(suite="memory", ms_p50=None, mb=200.0)
    text = compare([a], [replace(a, mb=100.0, threads=4)])
    assert text.startswith("note: threads differs: 2 against 4")
    assert text.split()[-1] == "0.50"


def test_a_wrong_result_gets_no_time_and_no_speed_up() -> None:
    truth = torch.randn(64, dtype=torch.float64)
    good, bad = truth.float(), truth.float() * 1.001
    given = case(variant("torch", good, library=True), variant("fastnull", bad, twice=True), reference=truth)
    rows = measured(given)
    assert [r.backend for r in rows] == ["torch", "fastnull"]  # no twin of what is wrong
    assert rows[0].ms_p50 is not None
    assert rows[1].ms_p50 is None
    assert rows[1].note.startswith("WRONG: error 0.001")
    assert " - " in common.format_case(given, rows).splitlines()[-1]


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: -x,
        lambda x: torch.where(torch.arange(64) == 5, float("nan"), x),
        lambda x: x[:-1],
        lambda x: torch.where(torch.arange(64) < 8, 0.0, x),
        torch.zeros_like,
    ],
    ids=["flipped", "nan", "short", "rows lost", "zeros"],
)
def test_the_gate_sees(broken: Callable[[Tensor], Tensor]) -> None:
    truth = torch.randn(64, dtype=torch.float64)
    verdicts = common.judged(
        case(variant("torch", truth.float(), library=True), variant("fastnull", broken(truth.float())), reference=truth)
    )
    assert verdicts["torch", torch.float32][1] == ""
    assert verdicts["fastnull", torch.float32][1]


def test_a_wrong_library_path_sets_no_budget() -> None:
    truth = torch.randn(64, dtype=torch.float64)
    verdicts = common.judged(
        case(variant("torch", -truth.float(), library=True), variant("fastnull", truth.float() * 1.5), reference=truth)
    )
    assert all(wrong for _, wrong in verdicts.values())


def test_a_broken_backend_is_caught_by_the_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong backward of the fast encoder. In finetune its direction must be wrong: a boundary step is normalised, so
    a scale changes nothing there, nor does a sign, which two norms a block cancel."""
    from fastnull.encoder.explicit import block

    right, damage = block.layer_norm_dx, lambda out: out.mul_(0.9)

    def broken(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        return damage(right(*args, out=out, **kwargs))

    monkeypatch.setattr(block, "layer_norm_dx", broken)
    # the encoder's own proof would find it first
    monkeypatch.setattr("fastnull.encoder.frozen.check_values", lambda *_, **__: None)
    (given,) = encoder_suite.cases(TINY)
    if not any("backend cpu" in v.note for v in given.variants):
        pytest.skip("the C++ ops are not built: the reference backend runs no written-out backward")
    assert {key for key, (_, text) in common.judged(given).items() if text} == {
        ("fastnull", torch.float32),
        ("fastnull", torch.bfloat16),
    }
    damage = lambda out: out.copy_(out.roll(1, -1))  # noqa: E731
    for given in finetune_suite.cases(TINY):
        assert {key[0] for key, (_, text) in common.judged(given).items() if text} == {"boundary"}


def test_a_synthesis_without_updates_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis_suite, "FRACTION", 10.0)  # ε far above the start's influence
    (given,) = synthesis_suite.cases(TINY)
    assert all("met ε already" in text for _, text in common.judged(given).values())


def test_a_skipped_variant_says_why_and_is_not_run() -> None:
    given = case(variant("torch", None), common.Variant("compiled", torch.float32, None, skip="no compiler"))
    assert [r.note for r in measured(given)] == ["", "skipped: no compiler"]


def test_a_variant_that_fails_says_why_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline out of memory where it is judged, and a call that no graph can hold, where it is prepared."""

    class Timer(common.CpuTimer):  # type: ignore[name-defined, misc]
        def prepare(self, variant: Any, copies: int) -> Any:
            if variant.graph:
                raise RuntimeError("operation not permitted when stream is capturing\nwith a second line")
            return super().prepare(variant, copies)

    def too_large(index: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(common, "timer_for", lambda device: Timer())
    truth = torch.randn(64, dtype=torch.float64)
    rows = measured(
        case(
            variant("torch", truth.float(), library=True),
            common.Variant("published", torch.float32, too_large),
            variant("fastnull, graph", truth.float(), graph=True, twice=True),
            variant("fastnull", truth.float()),
            reference=truth,
        )
    )
    notes = {r.backend: r.note for r in rows}
    assert notes["published"] == "FAILED: OutOfMemoryError: CUDA out of memory"
    assert notes["fastnull, graph"] == notes["fastnull, graph (again)"]
    assert notes["fastnull, graph"].endswith("not permitted when stream is capturing")
    assert [r.backend for r in rows if r.ms_p50 is not None] == ["torch", "fastnull"]


def test_torchs_attention_is_taken_by_name() -> None:
    """Of this machine those that run it give one result; what torch refuses is not among them."""
    qkv = torch.randn(2, 9, 3, 2, 8)
    names = attention.usable(qkv)
    assert "math" in names
    assert "cudnn" not in names  # a GPU's
    assert attention.fastest(qkv) in names
    for name in names:
        with attention.attention_by(name):
            torch.testing.assert_close(attention.sdpa(qkv), attention.sdpa(qkv.double()).float())


@pytest.mark.skipif(not _C.cpu_available(), reason="the C++ ops are not built")
def test_what_a_gpu_is_asked_in_the_suite_of_ops_is_proven_first() -> None:
    asked = {problem.name for problem in ops_suite.problems(TINY)}
    assert {name.split()[0] for name in asked} == {
        "layer_norm_out", "layer_norm_dx_out", "gelu_out", "dgelu_", "attention_out", "attention_dqkv_out",
        "noise_objective_means_out", "adamw_step_",
    }  # fmt: skip
    assert "attention_out float32 17 16" in asked


def test_the_baselines_take_an_attention_by_name() -> None:
    model = models.make_model("vit_digits", TINY)
    images, start = models.make_images(model, 4, TINY), models.make_start(model, TINY)
    plain, by_name = (
        baselines.frozen_step(model, images, start, torch.float32, attention=name)() for name in ("", "math")
    )
    torch.testing.assert_close(by_name, plain, rtol=1e-4, atol=1e-6)


def test_variants_are_interleaved_and_each_round_begins_with_another() -> None:
    order: list[tuple[str, int]] = []

    def named(name: str) -> Any:
        return common.Variant(name, torch.float32, lambda index: order.append((name, index)))

    timer = common.CpuTimer()
    columns = common.interleaved([timer.prepare(named(name), 2) for name in "ab"], 2, 0.0, 3, timer)
    assert [len(column) for column in columns] == [3, 3]
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)]


def test_percentiles_and_the_floor() -> None:
    assert common.percentiles([1.0]) == (1.0, 1.0, 1.0)
    assert common.percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    ceilings = common.Ceilings({torch.float32: 2e9, torch.bfloat16: 1e9}, 1e9)
    assert ceilings.floor_ms(work.Work(2e9, 0), torch.float32) == 1e3
    # 16 bits may be multiplied in float32 where that is the faster unit, so its floor is not the slow one
    assert ceilings.floor_ms(work.Work(2e9, 0), torch.bfloat16) == 1e3
    assert ceilings.floor_ms(work.Work(2e9, 3e9), torch.float32) == 3e3


class FakeCuda:
    """Events that count milliseconds of a clock which calls advance, and graphs that replay what was captured."""

    def __init__(self) -> None:
        self.clock, self.captured = 0.0, 0
        self.reached = 0.0  # by the host, which waits for events alone

    def synchronize(self) -> None:
        """Nothing runs."""

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: setattr(self, "clock", self.clock + 8.0))

    def graph(self, graph: Any) -> Any:
        self.captured += 1
        return nullcontext()

    def Event(self, enable_timing: bool) -> Any:
        fake = self

        class Event:
            def record(self) -> None:
                self.at = fake.clock

            def synchronize(self) -> None:
                fake.reached = self.at

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        return Event()


def test_the_gpu_timer_reads_events_and_divides_a_replay_by_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WARM_UP", 0.0)
    cuda = FakeCuda()
    timer = common.CudaTimer(cuda)

    def call(index: int) -> None:
        cuda.clock += 3.0

    plain = common.Variant("plain", torch.float32, call)
    graphed = common.Variant("graphed", torch.float32, call, graph=True)
    columns = common.interleaved([timer.prepare(variant, 4) for variant in (plain, graphed)], 4, 0.0, 2, timer)
    assert columns == [[3.0, 3.0], [2.0, 2.0]]  # one call of 3 ms; a replay of 8 ms holds 4 calls
    assert cuda.captured == 1


def test_the_host_is_at_most_two_rounds_ahead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So `seconds` limits how long the calls run: a call of 1 s is launched in microseconds."""
    monkeypatch.setattr(common, "WARM_UP", 0.0)
    cuda = FakeCuda()
    ahead = []

    def call(index: int) -> None:
        ahead.append(cuda.clock - cuda.reached)
        cuda.clock += 1000.0

    monkeypatch.setattr(common.time, "perf_counter", lambda: cuda.reached / 1000)
    timer = common.CudaTimer(cuda)
    (times,) = common.interleaved([(call, 1)], 1, 10.0, 3, timer)
    assert times == [1000.0] * 12
    assert max(ahead) == 2000.0


def test_the_counter_of_memory_agrees_with_a_known_pattern() -> None:
    def make() -> Callable[[], Any]:
        held = torch.empty(500_000)  # 2 MB, made inside
        del_me = torch.empty(2_500_000)  # 10 MB of the making: must not count
        del del_me

        def run() -> Tensor:
            first = torch.empty(750_000)  # 3 MB
            second = torch.empty(250_000)  # 1 MB
            del first
            return held + 0 * second.sum()  # 2 MB and a scalar, after 3 MB went

        return run

    assert memory.peak_of(make, "cpu") == pytest.approx(6e6, rel=1e-3)


def test_the_formulas_of_flops_agree_with_torchs_counter() -> None:
    """Forward, and input gradient where attention's backward does not recompute the scores (2 a instead of 2.5 a)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = models.make_model("vit_digits", TINY)
    vit = split(model)
    shape = work.ViTShape.of(vit)
    tokens = vit.embed(models.make_images(model, 3, TINY), "patch").detach().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = vit.logits(tokens, "patch")
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(logits.sum(), tokens)
    attention = shape.L * 4 * 3 * shape.N**2 * shape.D
    assert forward.get_total_flops() == work.forward_flop(shape, 3)
    assert backward.get_total_flops() == work.input_gradient_flop(shape, 3) - 0.5 * attention


def test_all_steps_give_one_gradient_move_on_and_leave_the_model() -> None:
    model = models.make_model("vit_digits", TINY)
    images, start = models.make_images(model, 4, TINY), models.make_start(model, TINY)
    before = [parameter.clone() for parameter in model.parameters()]
    steps = [
        baselines.published_step(model, images, start, torch.float32),
        baselines.frozen_step(model, images, start, torch.float32),
        baselines.fastnull_step(encoder_suite.FrozenEncoder(model), images, start),
    ]
    first, second = ([step() for step in steps] for _ in range(2))
    for gradient in first[1:]:
        torch.testing.assert_close(gradient, first[0], rtol=1e-3, atol=1e-5)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))


def test_the_fraction_of_the_products_is_of_those_the_encoder_computes() -> None:
    """A bfloat16 encoder may multiply in float32: held against bfloat16 products its step could take less than they."""
    times = {("fastnull", "bfloat16"): 4.0, (encoder_suite.PRODUCTS, "bfloat16"): 8.0}
    times |= {(encoder_suite.PRODUCTS, "float32"): 2.0, ("frozen", "bfloat16"): 6.0}
    rows = [row(backend=backend, dtype=dtype, ms_p50=ms) for (backend, dtype), ms in times.items()]
    lines = encoder_suite._summary("m", rows, {"bfloat16": "float32", "float32": "float32"})
    assert f"m bfloat16: {encoder_suite.PRODUCTS} alone, in float32, take 50 % of the step's time" in lines
    assert "m bfloat16: 1.50 x the speed of the better frozen baseline in bfloat16" in lines


def test_an_interrupted_run_keeps_the_finished_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(settings: BenchSettings) -> Iterator[Any]:
        yield case(variant("torch", None))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench._suite("bench_ops"), "cases", cases)
    with pytest.raises(KeyboardInterrupt):
        run_bench(TINY, ["ops"], tmp_path, quiet=True)
    assert len(read_rows(tmp_path / "rows.csv")) == 1
    assert len(read_rows(next(tmp_path.glob("*.json")))) == 1


def test_threads_are_set_for_the_run_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    path = run_bench(replace(TINY, threads=2), ["projection"], tmp_path, quiet=True)
    assert json.loads(path.read_text())["rows"][0]["threads"] == 2
    assert torch.get_num_threads() == before


def test_the_command_runs_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--only", "encoder", "--models", "vit_digits", "--dtypes", "float32", "--device", "cpu"]
    bench.bench(bench_arguments(*words, "--threads", "1", "--out", str(tmp_path)))
    shown = capsys.readouterr().out
    assert "x the speed of the published loop (float32)" in shown
    path = str(next(tmp_path.glob("*.json")))
    bench.bench(bench_arguments("--compare", path, str(tmp_path / "rows.csv")))
    assert "1.00" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"batch": 0}, {"dtypes": ("int8",)}, {"seconds": -1.0}, {"threads": 0}])
def test_bad_settings_are_told(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).removesuffix("s")):
        replace(TINY, **change)


def test_an_unknown_suite_and_a_missing_checkout_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="suite must be one of"):
        run_bench(TINY, ["encodr"], tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="source checkout"):
        run_bench(TINY, ["ops"], tmp_path)


@pytest.mark.slow
def test_pytest_benchmark_runs_the_op_suites(tmp_path: Path) -> None:
    """The command of `make bench`, one op of it; benchmarks/pytest.ini is found from the argument."""
    out = tmp_path / "ops.json"
    words = ["benchmarks/bench_ops.py", "-k", "adamw_step", "--benchmark-only", f"--benchmark-json={out}", "-q"]
    command = [sys.executable, "-m", "pytest", *words, "--benchmark-max-time=0.01", "-p", "no:cacheprovider"]
    # a worker of pytest-xdist says so to its children, which would then measure nothing
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, timeout=300, env=alone)
    assert run.returncode == 0, run.stdout + run.stderr
    names = [entry["name"] for entry in json.loads(out.read_text())["benchmarks"]]
    assert any("fastnull-bfloat16" in name for name in names)


def test_a_result_is_drawn(tmp_path: Path) -> None:
    rows = [
        row(suite="encoder", op="vit", backend="frozen", ms_p50=3.0, ms_p20=2.5, ms_p80=3.5),
        row(suite="encoder", op="vit", backend="fastnull"),
        row(suite="encoder", op="vit", backend="compiled", ms_p50=None, note="skipped"),
        row(suite="memory", op="vit", ms_p50=None, ms_p20=None, ms_p80=None, mb=12.0),
    ]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"rows": [asdict(one) for one in rows]}))
    bench.bench(bench_arguments("--plot", str(result), str(tmp_path / "all.svg")))
    text = (tmp_path / "all.svg").read_text()
    assert text.count("<!-- fastnull, float32 -->") == 2
    assert "<!-- compiled, float32 -->" not in text
    bench.bench(bench_arguments("--only", "memory", "--plot", str(result), str(tmp_path / "one.svg")))
    assert "frozen" not in (tmp_path / "one.svg").read_text()
    with pytest.raises(ValueError, match="at least one measurement"):
        bench.bench(bench_arguments("--only", "gemm", "--plot", str(result), str(tmp_path / "none.svg")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.svg", "one.svg", "result.json"]


def bench_arguments(*words: str) -> argparse.Namespace:
    """What the command line parses to."""
    parser = argparse.ArgumentParser()
    bench.add_bench_options(parser)
    return parser.parse_args(words)
