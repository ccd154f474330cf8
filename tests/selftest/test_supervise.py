"""The self-test's child process: what goes wrong in it costs one implementation. Real processes, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnull import _C
from fastnull.selftest import supervise
from fastnull.selftest.supervise import outcomes

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_whatever_an_implementation_does_costs_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right and slow, right and fast, wrong in one dtype or in one row, raising, aborting, hanging, too large."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")  # the child judges by assertions
    single, half, broken = (f"attention_out {dtype} 5 8" for dtype in ("float32", "bfloat16", "float8_e4m3fn"))
    with pytest.warns(RuntimeWarning, match=f"{broken} cannot be checked: ended its process"):
        found = outcomes([single, broken, half], CPU, 2, limit=6, module="tests.selftest.pretend")
    assert found.keys() == {single, half}, "a problem whose reference fails is left out, and the next one is solved"
    for problem in (single, half):
        reasons = {name: outcome.problem for name, outcome in found[problem].items()}
        assert reasons["raises"] == "RuntimeError: CUDA error: misaligned address"
        assert "out of resource: shared memory" in reasons["too_much_shared_memory"]
        assert reasons["declines"] == "does not take this problem here"
        assert "10 of" in reasons["leaves_a_row"] or "not finite" in reasons["leaves_a_row"]
        assert reasons["unsteady"] == "gives other bits when it runs again"
        assert reasons["fast"] == reasons["slow"] == ""
        times = {name: found[problem][name].ms for name in ("fast", "slow")}
        assert times["slow"] >= 3
        assert times["fast"] < times["slow"]
        assert found[problem]["fast"].error < 0.01
        assert found[problem]["fast"].floor > 0
    assert found[single]["aborts"].problem.startswith("ended its process (SIGABRT)")
    assert found[single]["hangs"].problem == "did not end within 6 s"
    assert found[half]["aborts"].problem == found[half]["hangs"].problem == ""
    assert found[single]["wrong_in_bfloat16"].problem == ""
    assert found[half]["wrong_in_bfloat16"].problem.startswith("wrong: attention_out: error")


def test_a_process_that_cannot_begin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "CODE", "import sys; sys.exit('no device')")
    with pytest.raises(RuntimeError, match=r"the self-test ended its process \(exit code 1\): no device"):
        outcomes(["attention_out float32 5 8"], CPU, 2)


@pytest.mark.skipif(not _C.cpu_available(), reason="the C++ ops are not built")
def test_the_kernels_themselves() -> None:
    """The C++ kernels, and Triton's in its interpreter, are right by the rule that a GPU's will be judged by."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install fastnull[triton]")
    problems = ["attention_out float32 5 8", "attention_dqkv_out float32 5 8", "noise_objective_out float32 4"]
    code = (
        "import sys, torch; from fastnull.selftest.supervise import outcomes\n"
        f"for problem, found in outcomes({problems}, torch.device('cpu'), 1).items():\n"
        "    for name, each in found.items(): print(problem, name, each.problem or 'right', sep=': ')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    wanted = {f"{problem}: {name}: right" for problem in problems for name in ("library", "cpu", "triton")}
    assert set(done.stdout.splitlines()) == wanted, done.stderr
