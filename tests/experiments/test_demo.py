"""The demo at its smallest: every part runs, the report has every section, and what is finished is not done again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastnull.experiments.compare
from fastnull.experiments.demo import DemoSettings, run_demo
from fastnull.experiments.settings import RECIPES
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.plan import step_cost

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = DemoSettings(
    # two methods, one with synthesis; a budget of 13 is one epoch of boundary noise
    seeds=1, methods=("none", "boundary-tokens"), start_epochs=1, budget=13, eps=(8,), pgd_steps=1,
    severities=(1,), images=24, quick=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    threads = torch.get_num_threads()
    page = run_demo(folder, TINY, progress=False)
    assert page == folder / "report" / "report.html"
    assert torch.get_num_threads() == threads
    return folder


def test_report_has_every_section(done: Path) -> None:
    text = (done / "report" / "report.md").read_text(encoding="utf-8")
    titles = ("Result", "What holds on this data and what does not", "Accuracy under attack", "The noise",
              "Accuracy under corruption", "All numbers", "How it was obtained", "Reproduce it")  # fmt: skip
    for title in titles:
        assert f"# {title}" in text
    assert "Quick run" in text
    assert "fastnull demo --quick" in text
    pictures = {path.stem for path in (done / "report" / "figures").iterdir()}
    assert pictures == {"overview", "accuracy_over_eps", "corruptions", "influence", "token_noise", "exact_nullspace"}
    # the exact nullspace moves no prediction, and the report says by how much
    assert "no probability moves by more than" in text


def test_methods_start_alike_and_cost_alike(done: Path) -> None:
    plans = {}
    for method in TINY.methods:
        about = json.loads((done / "seed-0" / method / "config.json").read_text())
        assert about["config"]["checkpoint"].endswith("seed-0/start/last.safetensors")
        plans[method] = about["plan"]
    costs = [plan["total_cost"] for plan in plans.values()]
    assert max(costs) <= 13 * 1297
    # a step of boundary noise is the coarser one: within one of them of the budget
    assert min(costs) > 13 * 1297 - 13 * 64
    assert plans["none"]["steps"] > 4 * plans["boundary-tokens"]["steps"]


def test_resume_does_nothing_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = done / "seed-0" / "boundary-tokens" / "last.safetensors"
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr("fastnull.finetune.training.Training.train_step", lambda *_: pytest.fail("trained again"))
    run_demo(done, TINY, resume=True, progress=False)
    assert weights.stat().st_mtime_ns == before


def test_refuses_what_is_there(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a demo already"):
        run_demo(done, TINY)
    with pytest.raises(ValueError, match="other settings: budget"):
        run_demo(done, replace(TINY, budget=26), resume=True)
    with pytest.raises(ValueError, match="not both"):
        run_demo(done, TINY, resume=True, overwrite=True)
    (tmp_path / "precious.txt").write_text("mine")
    for how in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match="is not empty and holds no demo"):
            run_demo(tmp_path, TINY, **how)
    assert (tmp_path / "precious.txt").exists()
    with pytest.raises(ValueError, match="is a file"):
        run_demo(tmp_path / "precious.txt", TINY)


def test_overwrite_starts_over(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.json").write_bytes((done / "demo.json").read_bytes())
    stale = tmp_path / "seed-7" / "random"
    stale.mkdir(parents=True)
    (tmp_path / "note.txt").write_text("mine")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastnull.experiments.compare, "work", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, TINY, overwrite=True, progress=False)
    assert not stale.exists(), "a run of another demo would be in the report"
    assert (tmp_path / "note.txt").exists()
    # what is left can be gone on with
    assert json.loads((tmp_path / "demo.json").read_text())["settings"]["budget"] == 13


def test_missing_extras_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"needs {package}: pip install fastnull\[demo\]"):
                run_demo(tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()


def test_recipes_are_valid_and_budgets_pay_for_them() -> None:
    for settings in (DemoSettings(), DemoSettings.quickly()):
        for method in settings.methods:
            config = FinetuneConfig(**RECIPES[method])
            # at least five epochs of the dearest method, or a learning rate schedule means nothing
            assert settings.budget / step_cost(config) >= 5
    with pytest.raises(ValueError, match="Did you mean 'boundary-tokens'"):
        DemoSettings(methods=("boundary-token",))
    with pytest.raises(ValueError, match="seeds must be"):
        DemoSettings(seeds=0)


def test_jobs_are_processes_as_in_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they compute is tested there."""
    asked: list[int] = []

    def stop(work: object, tasks: object, jobs: int, *_: object) -> None:
        asked.append(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(fastnull.experiments.compare, "run_in_processes", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", TINY, jobs=2, progress=False)
    assert asked == [2]
