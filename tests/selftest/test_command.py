"""`fastnull selftest`: the kernels of this machine's CPU, at the sizes of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastnull import _C, choices
from fastnull.cli import commands, main
from fastnull.encoder import FrozenEncoder
from fastnull.selftest import run
from fastnull.vit import NormalizedModel


@pytest.mark.skipif(not _C.cpu_available(), reason="the C++ ops are not built")
def test_the_table_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every op of a step is there, every kernel is right, and torch's own is beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_found", {})
    monkeypatch.setattr(run, "_tried", set())
    out = tmp_path / "selftest.json"
    assert main(["selftest", "vit_digits", "--device", "cpu", "--batch", "1", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    ops = {problem.split()[0] for problem in written["results"]}
    assert ops == {
        "layer_norm_out", "layer_norm_dx_out", "gelu_out", "dgelu_", "attention_out", "attention_dqkv_out",
        "patch_project_out", "noise_objective_means_out", "adamw_step_", "direct_step_",
    }  # fmt: skip
    for problem, found in written["results"].items():
        assert found.keys() >= {"library"}, problem
        assert not [outcome["problem"] for outcome in found.values() if outcome["problem"]], problem
    assert "cpu" in written["results"]["attention_out float32 17 16"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["problem", "implementation", "ms", "of", "floor", "error"]
    assert sum(line.endswith("<") for line in table) == len(written["results"])
    assert written["provenance"]["device"] == "cpu"


def test_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "_device", lambda args: torch.device("mps"))
    assert main(["selftest", "vit_digits"]) == 2
    assert "--device must be a CPU or a CUDA device; got mps, which has no kernels" in capsys.readouterr().err


def test_where_nothing_is_checked(vit: NormalizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend 'reference' runs the model's own modules on cpu: no op to check"):
        FrozenEncoder(vit, backend="reference").check_kernels()
    monkeypatch.setenv(choices.SWITCH, "off")
    with pytest.raises(ValueError, match="FASTNULL_SELFTEST=off keeps kernels from being checked: unset it"):
        FrozenEncoder(vit, backend="cpu", selftest="force").check_kernels()
    monkeypatch.delenv(choices.SWITCH)
    with pytest.raises(ValueError, match=r"selftest must be one of 'auto', 'off', 'force'; got 'no'"):
        FrozenEncoder(vit, selftest="no")
