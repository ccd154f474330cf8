"""The comparison at its smallest: equal compute, equal norms, paired statistics, resuming, and refusals."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastnull.experiments.compare
from fastnull.cli import main
from fastnull.experiments.compare import run_compare
from fastnull.experiments.settings import RECIPES, CompareSettings
from fastnull.experiments.tasks import Inputs, Task, plan_tasks
from fastnull.progress import _Silent
from fastnull.report.claims import compare
from fastnull.report.comparison import format_comparison, summarize_runs
from fastnull.report.runs import Run
from fastnull.synthesis.config import RECOMMENDED

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

BUDGET = 7
TINY = CompareSettings(
    methods=("none", "random-pixels", "boundary-pixels", "wide"),
    recipes={"wide": {"augment": "random", "noise": {"limit": 1}}},
    seeds=2, first_seed=3, start_epochs=1, budget=BUDGET, eps=(8,), pgd_steps=1, corruptions=("contrast",),
    severities=(1,), images=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    run_compare(folder, TINY, progress=False)
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def test_numbers_are_those_of_the_runs(done: Path) -> None:
    record = record_of(done)
    assert list(record["methods"]) == list(TINY.methods)
    for method, found in record["methods"].items():
        assert list(found["seeds"]) == ["3", "4"]
        clean = []
        for seed in (3, 4):
            results = json.loads((done / f"seed-{seed}" / method / "results.json").read_text())
            assert found["seeds"][str(seed)]["clean"] == results["summary"]["clean"]
            clean.append(results["summary"]["clean"])
            # equal compute: within one step of the dearest method
            assert BUDGET - 4.5 * 64 / 1297 < found["seeds"][str(seed)]["forward_passes"] <= BUDGET
        assert found["mean"]["clean"] == pytest.approx(statistics.fmean(clean))
        assert found["std"]["clean"] == pytest.approx(statistics.stdev(clean))
        assert found["mean"]["seconds"] > 0
    pairs = {(row["method"], row["other"]) for row in record["differences"]}
    assert len(pairs) == 4 * 3
    assert {row["measure"] for row in record["differences"]} == {"clean", "adversarial_mean", "corruption_mean"}
    assert record["provenance"]["torch"] == torch.__version__
    told = (done / "comparison.md").read_text()
    assert told.startswith("| finetuned with |")
    assert "| accuracy [%] | fgsm | pgd |" in told
    text = (done / "report" / "report.md").read_text()
    assert "| random-pixels |" in text  # runs are called by their methods
    assert "limit" not in text.partition("## Settings")[0]
    assert (done / "report" / "figures" / "accuracy_over_eps.png").exists()


def test_random_noise_has_the_norm_of_the_other(done: Path) -> None:
    for seed in (3, 4):
        means = {}
        for method in ("boundary-pixels", "random-pixels"):
            lines = (done / f"seed-{seed}" / method / "metrics.jsonl").read_text().splitlines()
            norms_seen = [record["norm"] for record in map(json.loads, lines) if record["kind"] == "step"]
            means[method] = statistics.fmean(norms_seen)
        # the limit is found on other images than those of the steps
        assert means["random-pixels"] == pytest.approx(means["boundary-pixels"], rel=0.03)
    limits = [run["limit"] for run in record_of(done)["methods"]["random-pixels"]["seeds"].values()]
    assert limits[0] != limits[1]


def test_resume_does_only_what_is_missing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = record_of(done)
    for weights in done.rglob("*.safetensors"):
        weights.unlink()  # a finished row needs none
    monkeypatch.setattr(fastnull.experiments.compare, "work", lambda *_: pytest.fail("done again"))
    run_compare(done, TINY, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"other settings: budget \(was 7, now 26\)"):
        run_compare(done, replace(TINY, budget=26), resume=True)
    with pytest.raises(ValueError, match="holds a comparison already"):
        run_compare(done, TINY)
    names: list[str] = []

    def work(task: Task, tell: Callable[[float], None]) -> str:
        names.append(task.name)
        return do(task, tell)

    do = fastnull.experiments.tasks.work
    monkeypatch.setattr(fastnull.experiments.compare, "work", work)
    (done / "seed-4" / "boundary-pixels" / "results.json").unlink()
    run_compare(done, TINY, resume=True, progress=False)
    assert names == ["seed 4, start", "seed 4, boundary-pixels"]
    after = record_of(done)
    assert after["differences"] == before["differences"]
    assert after["about"] == before["about"]


def test_another_version_with_other_recipes_does_not_continue(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (done / "comparison.json").read_bytes()
    monkeypatch.setitem(RECOMMENDED["boundary", True], "step_size", 10 / 255)
    with pytest.raises(ValueError, match=r"other settings: step_size of boundary-pixels \(was 0\.047.*, now 0\.039"):
        run_compare(done, TINY, resume=True)
    monkeypatch.undo()
    monkeypatch.setitem(RECIPES, "random-pixels", {**RECIPES["random-pixels"], "noise_fraction": 0.25})
    with pytest.raises(ValueError, match=r"other settings: noise_fraction of random-pixels \(was 0\.5, now 0\.25\)"):
        run_compare(done, TINY, resume=True)
    assert (done / "comparison.json").read_bytes() == before


def test_a_run_begun_by_another_version_starts_over(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    begun = out / "seed-4" / "boundary-pixels"
    (begun / "results.json").unlink()
    settings = json.loads((begun / "config.json").read_text())
    settings["synthesis"]["step_size"] = 10 / 255
    (begun / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(fastnull.experiments.compare, "work", lambda *_: pytest.fail("begins"))
    with pytest.raises(pytest.fail.Exception, match="begins"):
        run_compare(out, TINY, resume=True, progress=False)
    assert not begun.exists()
    assert (out / "seed-3" / "boundary-pixels" / "results.json").exists()


def test_other_noise_of_the_same_norm_is_another_recipe(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**RECIPES["random-pixels"], "noise": {"contrast": 0.1}}
    monkeypatch.setitem(RECIPES, "random-pixels", other)
    with pytest.raises(ValueError, match=r"other settings: contrast of random-pixels \(was 0\.0, now 0\.1\)"):
        run_compare(done, TINY, resume=True)


def test_a_finished_comparison_can_be_extended(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("*.safetensors"))
    # of an earlier version, without the fields that were added since
    record = record_of(out)
    for name in ("restarts", "final_iterate", "corruption_size", "frost_folder", "skip_bad"):
        del record["settings"][name]
    (out / "comparison.json").write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in out.glob("seed-*/*/results.json")}
    names: list[str] = []

    def work(task: Task, tell: Callable[[float], None]) -> str:
        names.append(task.name)
        return do(task, tell)

    do = fastnull.experiments.tasks.work
    monkeypatch.setattr(fastnull.experiments.compare, "work", work)
    more = replace(
        TINY, methods=("smooth", *TINY.methods), first_seed=2, seeds=3,
        recipes={**TINY.recipes, "smooth": {"augment": "random", "site": "pixels", "norm_of": "boundary-pixels"}},
    )  # fmt: skip
    now = run_compare(out, more, resume=True, progress=False)
    new = [f"seed 2, {name}" for name in ("start", "none", "boundary-pixels", "wide", "smooth", "random-pixels")]
    old = [f"seed {seed}, {name}" for seed in (3, 4) for name in ("start", "smooth")]
    assert sorted(names) == sorted([*new, *old])
    assert names.index("seed 3, start") < names.index("seed 3, smooth")
    assert {path: path.read_bytes() for path in before} == before
    assert list(now["methods"]) == list(more.methods)
    for name in TINY.methods:
        assert list(now["methods"][name]["seeds"]) == ["2", "3", "4"]
    assert len(next(row for row in now["differences"] if row["method"] == "smooth")["per_seed"]) == 3
    after = plan_tasks(out, more, Inputs())[0][-1].after
    assert [folder.name for folder in after] == ["start", "boundary-pixels"], "what another process must have finished"


def test_the_bar_counts_all_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []

    class Bar(_Silent):
        def __init__(self, total: float, initial: float) -> None:
            super().__init__()
            self.total, self.n, self.lines, self.disable = total, initial, [], False
            bars.append(self)

        def update(self, n: float = 1) -> None:
            assert n >= 0
            self.n += n

        def write(self, text: str) -> None:
            self.lines.append((text, self.n))

    monkeypatch.setattr(
        fastnull.experiments.compare, "progress_bar", lambda total, *, initial=0, **_: Bar(total, initial)
    )
    settings = replace(TINY, seeds=1, methods=("none", "boundary-pixels"))
    for _ in range(2):
        run_compare(tmp_path / "out", settings, resume=True)
    first, again = bars
    assert first.n == pytest.approx(first.total, abs=2)
    assert [line.partition(":")[0] for line, _ in first.lines] == [
        "seed 3, start", "seed 3, none", "seed 3, boundary-pixels"
    ]  # fmt: skip
    told = [n for _, n in first.lines]
    assert told[1] - told[0] > 0.9 * BUDGET * 1297
    assert (again.n, again.lines) == (pytest.approx(again.total, abs=2), [])


def test_weights_are_removed_where_nobody_keeps_them(tmp_path: Path) -> None:
    settings = replace(TINY, seeds=1, methods=("none",), keep_weights=False)
    run_compare(tmp_path / "out", settings, progress=False)
    left = {path.name for path in (tmp_path / "out" / "seed-3").rglob("*") if path.is_file()}
    assert left == {"config.json", "metrics.jsonl", "results.json", "start.json"}


@pytest.mark.slow
def test_processes_give_the_same_numbers_in_the_right_order(tmp_path: Path, done: Path) -> None:
    settings = replace(TINY, seeds=1, methods=("random-pixels", "boundary-pixels"))  # the first waits for the second
    record = run_compare(tmp_path / "out", settings, jobs=2, progress=False)
    alone = record_of(done)["methods"]
    for method in settings.methods:
        mine, theirs = record["methods"][method]["seeds"]["3"], alone[method]["seeds"]["3"]
        for name in ("clean", "adversarial_mean", "corruption_mean", "limit", "steps"):
            assert mine[name] == theirs[name]


def test_compute_is_called_equal_only_where_it_is(done: Path) -> None:
    record = record_of(done)
    assert "over 2 seeds, at equal training compute." in format_comparison(record)
    record["methods"]["wide"]["mean"]["forward_passes"] = BUDGET - 1.5
    told = format_comparison(record)
    spent = record["methods"]["none"]["mean"]["forward_passes"]
    assert f"at most the same training compute (forward passes for each training image: none {spent:.3g}" in told
    assert "wide 5.5)." in told
    record["methods"]["wide"]["mean"]["forward_passes"] = None
    assert "over 2 seeds, at most the same training compute." in format_comparison(record)


def test_statistics_by_hand() -> None:
    def run(method: str, seed: int, clean: float) -> Run:
        summary = {"clean": clean, "adversarial_mean": clean / 2, "corruption_mean": None, "mce": None}
        results = {"corruptions": {"impulse_noise": {"1": clean, "5": clean - 20}}}
        return Run(
            method, seed, {"summary": summary, "results": results}, {"config": {"limit": None}}, {"seconds": 2.0}
        )

    values = {"a": (70.0, 74.0, 78.0), "b": (71.0, 70.0, 75.0)}
    runs = [run(method, seed, clean) for method, row in values.items() for seed, clean in enumerate(row)]
    record = summarize_runs(runs, ("a", "b"))
    assert record["methods"]["a"]["mean"]["clean"] == 74
    assert record["methods"]["a"]["std"]["clean"] == 4
    assert record["methods"]["a"]["mean"]["corruption_mean"] is None
    (row,) = [r for r in record["differences"] if (r["method"], r["measure"]) == ("a", "clean")]
    assert row["per_seed"] == [-1, 4, 3]  # paired by seed
    # mean 2, s = sqrt(7), t(2 degrees) = 4.303
    half = 4.302653 * 7**0.5 / 3**0.5
    assert (row["mean"], row["low"], row["high"]) == (2, pytest.approx(2 - half), pytest.approx(2 + half))
    assert compare({"a": {0: {"clean": 1.0}}, "b": {1: {"clean": 2.0}}}, "a", "b", "clean") is None
    assert record["methods"]["a"]["mean"]["corruption/impulse_noise"] == 64
    told = format_comparison(record)
    assert "| b | −2.0 (−8.6 to +4.6) |" in told
    assert "| corrupted [%] | impulse noise |\n|---|---:|\n| a | 64.0 ± 4.0 |\n| b | 62.0 ± 2.6 |" in told


def test_settings_without_a_finished_run_do_not_block(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun, state = out / "seed-3" / "start", out / "seed-3" / "start" / "state-000000001.pt"

    def prepare(settings: CompareSettings, train: int = 48, **how: bool) -> None:
        about = {"train": train, "pixels": (16, 16)}
        fastnull.experiments.compare._prepare(
            out, settings, about, "comparison", how.get("overwrite", False), how.get("resume", False)
        )

    prepare(TINY)
    begun.mkdir(parents=True)
    state.write_text("begun")
    for resume in (False, True):
        prepare(TINY, resume=resume)  # the same settings: it goes on
        assert state.exists()
    prepare(replace(TINY, budget=26))  # the corrected command: it starts over
    assert not begun.exists()
    assert record_of(out)["settings"]["budget"] == 26
    prepare(TINY)
    results, unfinished = out / "seed-3" / "none" / "results.json", out / "seed-3" / "wide"
    for place in (results.parent, unfinished):
        place.mkdir(parents=True)
    results.write_text("{}")
    with pytest.raises(ValueError, match="holds a comparison already"):
        prepare(TINY)
    with pytest.raises(
        ValueError, match=r"cannot resume the comparison in .* with other settings: train \(was 48, now"
    ):
        prepare(TINY, train=47, resume=True)
    for settings, message in (
        ({"first_seed": 4}, r"without seed-3.none, which is finished: methods and seeds can be added, not removed"),
        ({"methods": ("wide",)}, r"without seed-3.none"),
        ({"recipes": {**TINY.recipes, "none": {"augment": "trades"}}}, "with other settings: recipe of none"),
        ({"first_seed": 4, "lr": 1.0}, r"with other settings: lr \(was None, now 1.0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(replace(TINY, **settings), resume=True)  # type: ignore[arg-type]
    prepare(replace(TINY, seeds=5), resume=True)
    assert unfinished.exists()
    prepare(replace(TINY, recipes={"wide": {"augment": "random", "noise": {"limit": 2}}}), resume=True)
    assert not unfinished.exists(), "begun with another recipe"
    unfinished.mkdir()
    prepare(replace(TINY, methods=("none",), seeds=1), resume=True)
    assert not unfinished.exists(), "begun, and no longer asked for"
    assert results.exists()
    prepare(TINY, overwrite=True)
    assert not (out / "seed-3").exists()


def test_another_spelling_of_a_path_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "out" / "seed-3" / "none" / "results.json"

    def prepare(data: str) -> None:
        settings = replace(TINY, model="vit_digits", data=data)
        fastnull.experiments.compare._prepare(
            Path("out"), settings, {"data": data}, "comparison", overwrite=False, resume=True
        )

    prepare("images")
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    for data in ("./images", str(tmp_path / "images"), "images"):
        prepare(data)
    with pytest.raises(ValueError, match=r"other settings: data \(was 'images', now 'others/images'\)"):
        prepare("others/images")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "{}", '{"settings": 5}', '{"settings": null}'])
def test_a_damaged_record_is_told_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(text)
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"comparison\.json"):
            run_compare(tmp_path, TINY, resume=resume, progress=False)
    assert path.read_text() == text


def test_command_with_recipes_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = tmp_path / "recipes.json"
    recipes.write_text(json.dumps({"mine": {"augment": "trades", "attack_steps": 1, "trades_beta": 1}}))
    words = [
        "compare", "--data", "photos", "--methods", "mine", "none", "--recipes", str(recipes), "--seeds", "1",
        "--start-epochs", "1", "--budget", "9", "--eps", "8", "--pgd-steps", "1", "--images", "13", "--corruptions",
        "contrast", "--severities", "1", "2", "--jobs", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    pytest.importorskip("skimage")
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "| mine |" in text
    assert "| minus mine [points] |" in text
    settings = record_of(tmp_path / "out")["settings"]
    assert settings["severities"] == [1, 2]
    config = json.loads((tmp_path / "out" / "seed-0" / "mine" / "config.json").read_text())["config"]
    assert (config["model"], config["augment"], config["trades_beta"]) == ("vit_photos", "trades", 1)
    assert main(words) == 2
    assert "--resume continues" in capsys.readouterr().err
