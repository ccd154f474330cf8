"""scripts/gpu_check.sh and gpu_result.sh without a GPU: real dry runs, and what they ask of a pretended GPU machine."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastnull.bench import add_bench_options
from fastnull.models import create_model

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    1: ["install", "probe", "gradient", "built", "selftest", "steps", "tests"],
    2: ["install", "probe", "compiled", "built", "cuda", "sanitizer", "profile", "autotune"],
}


def run(script: str, *arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout `root` with this interpreter."""
    return subprocess.run(
        [str(root / "scripts" / script), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def results(table: str) -> dict[str, str]:
    """Part → its result."""
    lines = [line.split(": ", 1) for line in table.splitlines() if line[:1].isalpha() and line.endswith(" s")]
    return {part: result.rsplit(", ", 1)[0] for part, result in lines}


@pytest.mark.slow
def test_a_dry_run_does_every_part(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")
    # what run 2 has beside other rows of the benchmark
    for number, only in ((1, PARTS[1]), (2, ["sanitizer", "profile"])):
        done = run("gpu_check.sh", "--run", str(number), "--only", " ".join(only), "--dry-run", str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        table = (tmp_path / "table.txt").read_text()
        assert results(table) == dict.fromkeys(only, "ok")
        for text in ("backend cpu", "digits             ok", "attention_out float32 17 16: ") if number == 1 else ():
            assert text in table
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.txt", "profile.json", "selftest-vit_digits.json", "steps.json", "table.txt"]


PRETENDED = """#!/bin/sh
# python3 and compute-sanitizer of a GPU machine: notes what it is asked for, and leaves the files that it would leave
echo "$(basename "$0") $*" >>"{calls}"
for last; do :; done
case "$*" in
  {special}
  *get_device_capability*) echo 9.0a ;;
  *find_spec*) exit 1 ;;
  *gpu_table*) exec "{python}" "$@" ;;
  *"pip install"*) test -e fastnull/kernels && echo "no setuptools" && exit 1 ;;
  *setup.py*) test ! -e pyproject.toml && echo "nvcc for $TORCH_CUDA_ARCH_LIST, $FASTNULL_CUDA" >>"{calls}" ;;
  *"fastnull selftest"*) cp "{folder}/selftest" "$last" ;;
  *"fastnull bench"*)
    echo "rows of $FASTNULL_KERNELS" >>"{calls}"
    mkdir -p "$last" && cp "{folder}/bench" "$last/20260101T000000Z-x.json" ;;
  *pytest*) cat "{folder}/pytest" ;;
esac
"""
ROW = {"op": "vit_base_patch16_224", "dtype": "bfloat16", "floor_fraction": 0.5, "note": ""}
TESTS = """\
[gw0] [ 50%] PASSED tests/gpu/test_ops_on_gpu.py::test_attention[50-3-64-dtype0]
[gw1] [ 99%] FAILED tests/gpu/test_ops_on_gpu.py::test_opcheck
lost device in tests/gpu/test_ops_on_gpu.py::test_opcheck: CUDA error: an illegal memory access was encountered
FAILED tests/gpu/test_ops_on_gpu.py::test_opcheck - worker 'gw1' crashed
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout whose python3 and compute-sanitizer only pretend."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("csrc", "fastnull", "kernels", "tools"):
        (tmp_path / name).mkdir()
    for name in ("setup.py", "pyproject.toml", "calls"):
        (tmp_path / name).touch()
    rows = [
        {**ROW, "backend": "published", "ms_p50": 90.0},
        {**ROW, "backend": "fastnull", "ms_p50": None, "note": "WRONG"},
        {**ROW, "backend": "fastnull, graph", "ms_p50": 30.0},
    ]
    (tmp_path / "tools" / "bench").write_text(json.dumps({"rows": rows}))
    right, wrong = {"ms": 0.5, "floor": 0.5, "problem": ""}, {"ms": None, "floor": None, "problem": "error 0.4 " * 50}
    found = {f"attention_out bfloat16 {n} 64": {"library": right, "triton": wrong} for n in range(100)}
    (tmp_path / "tools" / "selftest").write_text(json.dumps({"results": found}))
    (tmp_path / "tools" / "pytest").write_text(TESTS * 20)
    pretend(tmp_path)
    return tmp_path


def pretend(machine: Path, special: str = "") -> None:
    """Make the tools, with a shell case before the others."""
    tools = machine / "tools"
    for name in ("python3", "compute-sanitizer"):
        text = PRETENDED.format(calls=machine / "calls", python=sys.executable, folder=tools, special=special)
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)


def check(machine: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{machine / 'tools'}{os.pathsep}{os.environ['PATH']}"
    out = str(machine / "out")
    return run("gpu_check.sh", *arguments, out, root=machine, PATH=path, PYTHON="python3", **environment)


@pytest.mark.parametrize("number", PARTS)
def test_what_a_gpu_is_asked_for(machine: Path, number: int) -> None:
    done = check(machine, "--run", str(number))
    assert done.returncode == 0, done.stdout + done.stderr
    table = (machine / "out" / "table.txt").read_text()
    assert results(table) == dict.fromkeys(PARTS[number], "ok")
    assert len(done.stdout) < 12_000
    assert len(list((machine / "out").iterdir())) <= 8
    assert not (machine / "fastnull" / "kernels").exists(), "the link to the kernels is for the run alone"
    calls = (machine / "calls").read_text()
    assert "nvcc for 9.0a, 1" in calls
    assert "  pip cannot install it (above): the checkout serves" in table
    parser = argparse.ArgumentParser()
    add_bench_options(parser)
    for words in [line.split("fastnull bench ")[1] for line in calls.splitlines() if "fastnull bench" in line]:
        assert parser.parse_args(words.split()).models[0] == "vit_base_patch16_224"
    if number == 1:
        assert "    fastnull bfloat16               - WRONG" in table
        assert "    fastnull, graph bfloat16           30.00  50 %   1.00" in table
        assert "  40 PASSED, 40 FAILED\n  FAILED tests/gpu/test_ops_on_gpu.py::test_opcheck - worker" in table
        assert "  attention_out 0 64: library 0.5 50 %; triton: error 0.4" in table
    else:
        assert [line.split()[-1] for line in calls.splitlines() if line.startswith("rows")] == [
            "triton",
            "cuda",
            "triton",
        ]
        assert [line.split()[2] for line in calls.splitlines() if line.startswith("compute-s")] == [
            "memcheck",
            "racecheck",
        ]


def test_parts_that_fail_or_do_not_end_are_counted_and_the_others_run(machine: Path) -> None:
    """What they had measured stays, and what an earlier run had does not."""
    bench = f'*"fastnull bench"*) mkdir -p "$last"; cp "{machine}/tools/bench" "$last/1Z-x.json"; sleep 60 ;;'
    pretend(machine, f'*"parts.py gradient"*) echo no luck; exit 3 ;;\n  {bench}')
    (machine / "out").mkdir()
    (machine / "out" / "tests.json").touch()
    done = check(machine, "--run", "1", "--only", "gradient steps tests", TOTAL="4")
    assert done.returncode == 3
    assert not (machine / "out" / "tests.json").exists()
    table = (machine / "out" / "table.txt").read_text()
    assert results(table) == {"gradient": "FAILED (3)", "steps": "out of time", "tests": "out of time"}
    assert "  no luck" in table
    assert "fastnull, graph bfloat16           30.00" in table


def test_a_failed_probe_ends_the_run(machine: Path) -> None:
    pretend(machine, '*"parts.py probe"*) echo the encoder would not run on this GPU: no Triton; exit 1 ;;')
    done = check(machine, "--run", "1")
    assert done.returncode == 1
    assert "  the encoder would not run on this GPU: no Triton" in done.stdout
    assert done.stdout.endswith("stopped: the probe says why\n")


def test_kernels_that_nvcc_cannot_build_are_reported(machine: Path) -> None:
    pretend(machine, "*setup.py*) echo nvcc is too old; exit 1 ;;")
    done = check(machine, "--run", "1", "--only", "built selftest")
    assert done.returncode == 1
    assert results(done.stdout) == {"built": "FAILED (1)", "selftest": "ok"}
    assert "  nvcc is too old" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("gpu_check.sh", "--run", "1", str(tmp_path), PYTHON="false")
    assert done.returncode == 96
    assert "torch sees no GPU; --dry-run" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gpu_check.sh", ["--run", "1"], "give a folder for the results"),
        ("gpu_check.sh", ["OUT"], "--run must be 1 or 2; got ''"),
        ("gpu_check.sh", ["--run", "3", "OUT"], "--run must be 1 or 2; got '3'"),
        ("gpu_check.sh", ["--fast", "OUT"], "unknown option --fast"),
        ("gpu_check.sh", ["--run", "2", "--only", "steps", "OUT"], "run 2 has no part steps (install probe"),
        ("gpu_result.sh", ["vit_digits", "OUT"], "give MODEL CHECKPOINT DATA OUT"),
    ],
)
def test_misuse_is_an_error(tmp_path: Path, script: str, arguments: list[str], message: str) -> None:
    done = run(script, *(str(tmp_path) if word == "OUT" else word for word in arguments))
    assert done.returncode == 98
    assert message in done.stderr


def test_a_worker_that_lost_its_device_ends_itself_and_the_others_go_on(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_some(n):\n"
        "    if n == 1: raise RuntimeError('CUDA error: an illegal memory access was encountered\\nmore')\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.gpu.lost_device", "-n", "2", "test_some.py"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert "3 passed" in said, said
    assert "lost device in test_some.py::test_some[1]: CUDA error: an illegal memory access was encountered\n" in said
    assert "replacing crashed worker" in said


@pytest.mark.slow
def test_the_result_on_a_checkpoint_and_a_folder_of_images(tmp_path: Path) -> None:
    """And a second call only goes on; on another machine from the archive."""
    pytest.importorskip("scipy", reason="the report needs the extra demo")
    save_file(create_model("vit_digits").network.state_dict(), tmp_path / "weights.safetensors")
    source = torch.Generator().manual_seed(0)
    for place in range(24):
        path = tmp_path / "images" / ("train", "val")[place % 2] / "abc"[place % 3] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (16, 16, 3), generator=source, dtype=torch.uint8).numpy()).save(path)
    given = [str(tmp_path / name) for name in ("weights.safetensors", "images", "out")]
    tiny = "--img-size 16 --seeds 1 --methods none --budget 3 --start-epochs 1 --batch-size 4 --images 4 --eps 1"
    options = [*tiny.split(), "--suite", "clean", "fgsm", "--jobs", "1", "--workers", "0", "--device", "cpu"]

    def result(runs: str) -> str:
        done = run("gpu_result.sh", "vit_digits", *given, *options, RUNS=str(tmp_path / runs), ATTACKS="fgsm")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "| finetuned with | clean [%] |" in done.stdout
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "runs.tar.gz", "table.txt"]
        return done.stdout

    assert "none, seed 0, fgsm:" in result("runs")
    assert (tmp_path / "runs" / "seed-0" / "none" / "autoattack.json").is_file()
    shutil.move(tmp_path / "out" / "runs.tar.gz", tmp_path / "again.tar.gz")
    result("again")
    assert not (tmp_path / "again" / "seed-0" / "none" / "last.safetensors").exists(), "a finished run was done again"


def test_a_comparison_out_of_time_gives_a_report_of_what_is_finished(machine: Path) -> None:
    compare = '*"fastnull compare"*) sleep 60 ;;'
    report = '*"fastnull report"*) mkdir -p "$6" && echo "| half |" >"$6/report.md" ;;'
    pretend(machine, f"{compare}\n  {report}")
    (machine / "runs").mkdir()
    (machine / "weights").touch()
    given = ["vit_digits", str(machine / "weights"), str(machine / "csrc"), str(machine / "out")]
    path = str(machine / "tools" / "python3")
    done = run("gpu_result.sh", *given, root=machine, PYTHON=path, TOTAL="3", ATTACK="1", RUNS=str(machine / "runs"))
    assert done.returncode == 1
    assert "compare ended with 124 after" in done.stdout
    assert "| half |" in done.stdout
    assert (machine / "out" / "runs.tar.gz").is_file()
