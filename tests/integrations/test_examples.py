"""Every example of an integration runs, in small, and prints what it should."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["timm_task.py", "lightning_callback.py", "hf_trainer.py"])
def test_training_with_and_without_noise(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(name, capsys, monkeypatch, "--epochs", "1")
    assert len(re.findall(r"^clean: .*accuracy \d", out, re.MULTILINE)) == 1
    assert len(re.findall(r"^boundary noise: .*accuracy \d", out, re.MULTILINE)) == 1
    if name != "hf_trainer.py":
        assert all(float(value) > 0 for value in re.findall(r"(?:influence|norm) ([\d.e+-]+)", out))
        assert "influence" in out


def test_accelerate_saves_and_loads_the_noise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run("accelerate_loop.py", capsys, monkeypatch, "--epochs", "2")
    assert "saved and loaded: the noise goes on at step 20" in out
    assert out.count("accuracy") == 2


def test_exact_noise_of_the_transform_moves_no_logit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run("torchvision_transform.py", capsys, monkeypatch, "--epochs", "1")
    found = re.findall(r"pixels change by ([\d.]+) rms, logits by ([\d.e+-]+) at most", out)
    (exact, unmoved), (inexact, moved) = [(float(a), float(b)) for a, b in found]
    assert exact > 0.01
    assert unmoved < 1e-4
    assert inexact > 0.001
    assert moved > 1e-3
