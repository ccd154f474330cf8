"""scripts/gpu_check.sh without a GPU: its dry run does every part, keeps measurements and reports failures."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastnull.bench import Row, add_bench_options
from fastnull.bench.run import SUITES

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
WANTED = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch32_224", "vit_large_patch16_224")


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with this interpreter."""
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_dry_run_does_every_part(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")
    done = check("--dry-run", str(tmp_path / "out"))
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.txt", "ops.json", "selftest.json", "steps.json", "summary.json", "table.txt"]

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {part["part"]: part["status"] for part in summary["parts"]} == dict.fromkeys(
        ("build", "selftest", "tests", "steps", "ops", "noise", "finetune", "kernels", "cpp", "sanitizer"), 0
    )
    assert all(seconds > 0 for seconds in summary["profile"]["phases"].values())
    assert summary["build"]["torch"] == torch.__version__
    (step,) = summary["steps"]
    assert step["model"] == "vit_digits"
    assert all(step[f"x {name}"] > 0 for name in ("frozen", "published"))
    assert len({op["op"] for op in summary["ops"]}) == 12
    assert summary["noise"]["relative"].keys() == {"influence", "norm"}
    assert done.stdout.rstrip().endswith((tmp_path / "out" / "table.txt").read_text().rstrip())


def fake_python(folder: Path, bench: str) -> str:
    """A Python whose benchmarks are the shell script `bench`."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"fastnull bench"*) ;; *) exec "{sys.executable}" "$@" ;; esac\n{bench}'
    )
    python.chmod(0o755)
    return str(python)


def test_a_part_that_fails_is_counted_and_the_others_run(tmp_path: Path) -> None:
    python = fake_python(tmp_path, 'echo "no luck"; exit 3\n')
    done = check("--dry-run", "--only", "steps ops build", str(tmp_path / "out"), PYTHON=python)
    assert done.returncode == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(part["part"], part["status"] != 0) for part in summary["parts"]] == [
        ("steps", True), ("ops", True), ("build", False),
    ]  # fmt: skip
    assert "steps  FAILED" in done.stdout
    assert "no luck" in (tmp_path / "out" / "log.txt").read_text()


def test_a_part_out_of_time_keeps_what_it_measured(tmp_path: Path) -> None:
    result = json.dumps({"rows": [row("fastnull", "bfloat16", 30.0)]})  # the first case; the second does not end
    bench = f'for last; do :; done\nmkdir -p "$last"\necho \'{result}\' >"$last/20260101T000000Z-x.json"\nsleep 60\n'
    python = fake_python(tmp_path, bench)
    done = check("--dry-run", "--only", "steps noise", str(tmp_path / "out"), PYTHON=python, TOTAL="3")
    assert done.returncode == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [part["status"] for part in summary["parts"]] == [124, 124]
    assert [step["ms"] for step in summary["steps"]] == [30.0]


PRETENDED = """#!/bin/sh
# python3 and compute-sanitizer of a GPU machine: notes what it is asked for, and leaves the files that it would leave
echo "$(basename "$0") $*" >>"{calls}"
for last; do :; done
case "$*" in
  *get_device_capability*) echo 9.0a ;;
  *gpu_summary*) exec "{python}" "$@" ;;
  *"fastnull selftest"*) echo '{{}}' >"$last" ;;
  *"fastnull bench"*) mkdir -p "$last" && echo '{{"rows": []}}' >"$last/20260101T000000Z-x.json" ;;
  *gpu_noise*) echo '{{"relative": {{"norm": 0.001}}}}' >"$last" ;;
  *profile_step*) echo '{{"phases": {{}}}}' >"$last" ;;
  *build_info*) echo "{{\\"archs\\": \\"$TORCH_CUDA_ARCH_LIST\\"}}" ;;
esac
"""


def test_what_a_gpu_is_asked_for(tmp_path: Path) -> None:
    """All parts on a pretended GPU: what comes back is at most eight files, and every benchmark's options are known."""
    tools, out, calls = tmp_path / "tools", tmp_path / "out", tmp_path / "calls"
    tools.mkdir()
    for name in ("python3", "compute-sanitizer"):
        (tools / name).write_text(PRETENDED.format(calls=calls, python=sys.executable))
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(tools / "python3")}
    done = check(
        "--only", "build selftest tests steps ops noise sanitizer kernels cpp finetune", str(out), **environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in out.iterdir())
    assert files == [
        "cpp.json", "finetune.json", "log.txt", "ops.json", "selftest.json", "steps.json", "summary.json", "table.txt",
    ]  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["build"] == {"archs": "9.0a"}, "nvcc compiles for the GPU that is there"
    assert summary["noise"] == {"relative": {"norm": 0.001}}
    lines = calls.read_text().splitlines()
    assert [line.split()[2] for line in lines if line.startswith("compute-sanitizer")] == ["memcheck", "racecheck"]
    parser = argparse.ArgumentParser()
    add_bench_options(parser)
    benches = [line.split("fastnull bench ")[1] for line in lines if "fastnull bench" in line]
    assert len(benches) == 4
    for words in benches:
        asked = parser.parse_args(words.split())
        assert set(asked.only or ()) <= set(SUITES)
        assert set(asked.models or ()) <= set(WANTED)


def test_the_last_part_has_all_the_time_that_is_left(tmp_path: Path) -> None:
    done = check("--dry-run", "--only", "noise build", str(tmp_path / "out"), TOTAL="300", PYTHON="true")
    limits = [int(line.split("at most ")[1].split()[0]) for line in done.stdout.splitlines() if line.startswith("==")]
    assert limits[0] == 75
    assert limits[1] >= 290


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check(str(tmp_path / "out"), PYTHON="false")
    assert done.returncode == 96
    assert "torch sees no GPU; --dry-run" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a folder for the results"),
        (["--fast", "out"], "unknown option --fast"),
        (["--only", "stops", "OUT"], "no part is called stops"),
    ],
)
def test_misuse_is_an_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = check(*(str(tmp_path) if word == "OUT" else word for word in arguments))
    assert done.returncode == 98
    assert message in done.stderr


@pytest.fixture
def summary() -> Any:
    """scripts/gpu_summary.py as a module."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "gpu_summary.py")))


def row(backend: str, dtype: str, ms: float | None, note: str = "") -> dict[str, Any]:
    return asdict(
        Row(
            date="d", commit="c", device="g", torch="t", triton="3", threads=1, suite="encoder",
            op="vit_base_patch16_224", backend=backend, mode="universal step", dtype=dtype, shape="batch 256",
            ms_p50=ms, floor_fraction=0.5 if ms else None, note=note,
        )
    )  # fmt: skip


def summarized(summary: Any, folder: Path, name: str, rows: list[dict[str, Any]], parts: str = "") -> dict[str, Any]:
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))
    (folder / "parts").write_text(parts)
    return summary.summarize(folder, folder)


def test_the_table_holds_ratios_and_what_was_wanted(summary: Any, tmp_path: Path) -> None:
    rows = [
        row("published", "float32", 180.0), row("frozen", "bfloat16", 45.0), row("compiled", "bfloat16", None),
        row("fastnull", "bfloat16", 32.0), row("fastnull, graph", "bfloat16", 30.0), row("published", "bfloat16", 90.0),
    ]  # fmt: skip
    found = summarized(summary, tmp_path, "steps", rows, "build\t0\t60\nsteps\t124\t260\nops\t1\t3\n")
    (step,) = found["steps"]
    assert (step["ms"], step["x frozen"], step["x compiled"], step["x published"]) == (30.0, 1.5, None, 6.0)
    text = summary.table(found)
    assert "steps  out of time  260" in text
    assert "ops    FAILED (1)   3" in text
    assert ["vit_base_patch16_224", "30", "30", "50", "%", "1.5", "(1.5)", "-", "(1.2)", "6", "(6)"] in [
        line.split() for line in text.splitlines()
    ]


def test_a_wrong_step_has_no_time_and_says_so(summary: Any, tmp_path: Path) -> None:
    rows = [row("frozen", "bfloat16", 45.0), row("fastnull", "bfloat16", None, "WRONG: error 0.4")]
    (step,) = summarized(summary, tmp_path, "steps", rows)["steps"]
    assert step["ms"] is None
    assert step["x frozen"] is None
    assert "WRONG" in step["note"]


def test_without_a_graph_the_eager_step_counts(summary: Any, tmp_path: Path) -> None:
    rows = [
        row("frozen", "bfloat16", 45.0, "attention flash"), row("fastnull, graph", "bfloat16", None, "FAILED: capture"),
        row("fastnull", "bfloat16", 30.0),
    ]  # fmt: skip
    (step,) = summarized(summary, tmp_path, "steps", rows)["steps"]
    assert step["ms"] == 30.0
    assert step["note"] == "frozen: attention flash"


def test_an_op_is_compared_with_torchs_fastest(summary: Any, tmp_path: Path) -> None:
    rows = [
        row("torch", "bfloat16", 3.0), row("torch, flash", "bfloat16", 2.0), row("torch, cudnn", "bfloat16", None),
        row("torch", "float32", 1.0), row("fastnull", "bfloat16", 1.0), row("fastnull, fused", "bfloat16", 0.5),
        row("fastnull (again)", "bfloat16", 1.0),
    ]  # fmt: skip
    ours, fused = summarized(summary, tmp_path, "ops", rows)["ops"]
    assert (ours["best other"], ours["x best other"], fused["x best other"]) == ("torch, flash", 2.0, 4.0)
    assert fused["op"] == "vit_base_patch16_224, fused"
