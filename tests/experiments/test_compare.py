"""The comparison at its smallest: equal compute, equal norms, paired statistics, resuming, and refusals."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastnull.experiments.compare
from fastnull.cli import main
from fastnull.data import embedded
from fastnull.experiments.compare import RECIPES, CompareSettings, run_compare, scale_of_norm
from fastnull.finetune.config import FinetuneConfig
from fastnull.finetune.plan import step_cost
from fastnull.models import load_model
from fastnull.report.claims import compare
from fastnull.report.comparison import format_comparison, summarize_runs
from fastnull.report.runs import Run
from fastnull.synthesis import SynthesisConfig
from fastnull.synthesis.solvers import norms, valid_noise
from fastnull.synthesis.starts import draw_start, step_source

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = CompareSettings(
    methods=("none", "random-pixels", "boundary-pixels", "wide"),
    recipes={"wide": {"augment": "random", "noise": {"limit": 1}}},
    seeds=2, first_seed=3, pretrain_epochs=1, budget=13, eps=(8,), pgd_steps=1, corruptions=("contrast",),
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
            assert 13 - 13 * 64 / 1297 < found["seeds"][str(seed)]["forward_passes"] <= 13
        assert found["mean"]["clean"] == pytest.approx(statistics.fmean(clean))
        assert found["std"]["clean"] == pytest.approx(statistics.stdev(clean))
        assert found["mean"]["seconds"] > 0
    pairs = {(row["method"], row["other"]) for row in record["differences"]}
    assert len(pairs) == 4 * 3
    assert {row["measure"] for row in record["differences"]} == {"clean", "adversarial_mean", "corruption_mean"}
    assert record["provenance"]["torch"] == torch.__version__
    assert (done / "comparison.md").read_text().startswith("| finetuned with |")
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


@pytest.mark.parametrize(
    ("site", "smooth", "contrast"),
    [("patch", 0.0, 0.0), ("pixels", 0.0, 0.0), ("pixels", 0.3, 0.0), ("pixels", 0.3, 0.4)],
)
def test_scale_of_norm(site: str, smooth: float, contrast: float) -> None:
    inputs = torch.rand(512, 3, 16, 16, generator=torch.Generator().manual_seed(0)).round()  # half of all noise is cut
    start = SynthesisConfig(
        mode="boundary", site=site, limit=0.1, limit_range=0.5, smooth_limit=smooth, contrast=contrast
    )
    scale = scale_of_norm(2.0, inputs, start)
    scaled = replace(start, limit=scale * 0.1, smooth_limit=scale * smooth)
    noise = draw_start(inputs, scaled, step_source(5, 0, torch.arange(512))).noise
    noise = valid_noise(inputs, noise) if site == "pixels" else noise
    assert float(norms(noise).mean()) == pytest.approx(2.0, rel=0.05)
    if site == "pixels":
        with pytest.raises(ValueError, match="no such noise in pixels"):
            scale_of_norm(1e3, inputs, start)


def test_resume_does_only_what_is_missing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = record_of(done)
    lost = done / "seed-4" / "boundary-pixels" / "results.json"
    lost.unlink()
    monkeypatch.setattr("fastnull.finetune.training.Training.train_step", lambda *_: pytest.fail("trained again"))
    run_compare(done, TINY, resume=True, progress=False)
    after = record_of(done)
    assert after["methods"] == before["methods"]
    assert after["differences"] == before["differences"]
    with pytest.raises(ValueError, match="other settings: seeds"):
        run_compare(done, replace(TINY, seeds=3), resume=True)
    with pytest.raises(ValueError, match="holds a comparison already"):
        run_compare(done, TINY)


def test_held_out_split_is_not_the_test_set(tmp_path: Path, done: Path) -> None:
    settings = replace(TINY, split="held-out", seeds=1, methods=("none",), images=None)
    run_compare(tmp_path / "out", settings, progress=False)
    folder = tmp_path / "out" / "seed-3"
    protocol = json.loads((folder / "none" / "results.json").read_text())["protocol"]
    assert protocol["n"] == round(0.2 * 1297)
    for name in ("pretrained", "none"):
        assert json.loads((folder / name / "config.json").read_text())["data"]["train"] == 1297 - protocol["n"]
    # its images are training images, those that neither training saw
    model = load_model(folder / "none" / "last.safetensors")
    held = fastnull.experiments.compare._evaluation_data(
        FinetuneConfig(data="digits", val_fraction=fastnull.experiments.compare.HELD_OUT), "held-out", model
    )
    train, test = embedded("digits", model)
    assert torch.equal(held[0][0], train[held.indices[0]][0])  # type: ignore[attr-defined]
    assert protocol["data"] != json.loads((done / "seed-3" / "none" / "results.json").read_text())["protocol"]["data"]
    assert len(test) == 500


@pytest.mark.slow
def test_processes_give_the_same_numbers_in_the_right_order(tmp_path: Path, done: Path) -> None:
    settings = replace(TINY, seeds=1, methods=("random-pixels", "boundary-pixels"))  # the first waits for the second
    record = run_compare(tmp_path / "out", settings, jobs=2, progress=False)
    alone = record_of(done)["methods"]
    for method in settings.methods:
        mine, theirs = record["methods"][method]["seeds"]["3"], alone[method]["seeds"]["3"]
        for name in ("clean", "adversarial_mean", "corruption_mean", "limit", "steps"):
            assert mine[name] == theirs[name]


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


def test_every_recipe_is_valid_and_the_budget_pays_for_it() -> None:
    settings = CompareSettings()
    assert set(settings.methods) == set(RECIPES)
    for method in settings.methods:
        # at least five epochs of the dearest method, or a learning rate schedule means nothing
        assert settings.budget / step_cost(settings.configuration(method)) >= 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("advers",)}, "Did you mean 'adversarial'"),
        ({"methods": ("clean-only",)}, "method clean-only is called none since version 0.2"),
        ({"methods": ("random-tokens",)}, "takes the norm of boundary-tokens, which must be among the methods"),
        ({"methods": ("x",), "recipes": {"x": {"augmnt": "none"}}}, "recipe of x: field must be one of"),
        (
            {"methods": ("x",), "recipes": {"x": {"augment": "boundary", "noise": {"eps": -1}}}},
            "recipe of x: noise: eps",
        ),
        (
            {"methods": ("universal", "x"), "recipes": {"x": {"augment": "none", "norm_of": "universal"}}},
            "scales the limits of random noise",
        ),
        ({"methods": ("universal", "universal")}, "methods must differ"),
        ({"methods": ()}, "at least one"),
        ({"data": "cifar"}, "data must be one of 'digits', 'photos'"),
        ({"split": "train"}, "split must be one of"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": True}, "seeds must be an integer"),
        ({"budget": "156"}, "budget must be a number"),
        ({"budget": 0}, "budget must be > 0"),
        ({"lr": -1}, "lr must be > 0"),
        ({"pretrain_lr": float("nan")}, "pretrain_lr must be a number"),
        ({"pretrain_epochs": 0}, "pretrain_epochs must be >= 1"),
        ({"pgd_steps": 0}, "pgd_steps must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"images": 0}, "images must be >= 1"),
        ({"corruptions": ("fgo",)}, "Did you mean 'fog'"),
        ({"corruptions": ()}, "corruptions must name at least one"),
        ({"corruptions": "fog"}, "corruptions must be a tuple"),
        ({"severities": (0,)}, "severities must be >= 1"),
        ({"severities": (6,)}, "severities must be >= 1 and <= 5"),
        ({"eps": ()}, "eps must name at least one"),
        ({"eps": (256,)}, "eps must be >= 0 and <= 255"),
        ({"eps": ("8/255",)}, r"eps\[0\] must be a number"),
        ({"methods": ("random-tokens", "boundary-tokens", "BOUNDARY-tokens")}, "methods must differ"),
        ({"recipes": {"x": 5}}, r"recipes\['x'\] must be a mapping"),
        ({"recipes": {"x": None}}, r"recipes\['x'\] must be a mapping"),
        ({"recipes": {"x": ["none"]}}, r"recipes\['x'\] must be a mapping"),
        ({"recipes": [1]}, "recipes must be a mapping"),
        ({"recipes": {5: {}}}, "a key of recipes must be a string"),
        ({"recipes": {"x": {"augment": ["none"]}}}, "recipe of x: augment must be a string"),
        ({"methods": ("x",), "recipes": {"x": {"augment": "random", "norm_of": 5}}}, "takes the norm of 5"),
        (
            {"methods": ("x",), "recipes": {"x": {"augment": "random", "norm_of": "x"}}},
            "norm of its own; x takes another one's itself",
        ),
        (
            {"methods": ("x", "none"), "recipes": {"x": {"augment": "random", "norm_of": "none"}}},
            "none adds no noise",
        ),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        CompareSettings(**changes)


BAD_NAMES = (
    "../x", "a/b", "/x", ".", "..", ".hidden", "a\\b", "", " ", "x.", "x ", "a|b", "a\nb", "a\0b", "-x", "pretrained",
    "Pretrained", "x" * 81,
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_folders(name: str) -> None:
    for methods in ((name,), ("none",)):  # also where it does not run
        with pytest.raises(ValueError, match="a method's name is a folder's too"):
            CompareSettings(methods=methods, recipes={name: {"augment": "none"}})


@pytest.mark.parametrize("name", ["x", "mine.v2", "ε 0.5", "eps=0.5 (tokens)", "x" * 80])
def test_names_that_are_folders(name: str) -> None:
    assert CompareSettings(methods=(name,), recipes={name: {"augment": "none"}}).recipe(name) == {"augment": "none"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("out", "elsewhere"), ("checkpoint", "x"), ("overwrite", True), ("seed", 1), ("data", "photos"), ("model", "x"),
     ("compute_budget", 1), ("epochs", 3), ("label", "x"), ("resume", False), ("val_fraction", 0.5)],
)  # fmt: skip
def test_recipes_do_not_set_what_all_have_alike(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"recipe of x: {field} is not for a recipe"):
        CompareSettings(methods=("x",), recipes={"x": {"augment": "none", field: value}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.1}, r"none: budget 0.1 .* less than the cost of one step"),
        ({"recipes": {"wide": {"augment": "none", "opt": "adamw", "accumulate": 7}}}, "wide: batch_size must be"),
    ],
)
def test_what_would_fail_later_is_told_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_compare(tmp_path / "out", replace(TINY, **changes), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_corruption_that_the_images_do_not_allow_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(images: torch.Tensor, severity: int, random: object) -> torch.Tensor:
        raise ValueError("too small")

    monkeypatch.setitem(fastnull.experiments.compare.CORRUPTIONS, "contrast", fails)
    with pytest.raises(ValueError, match="corruption contrast does not take these images: too small"):
        run_compare(tmp_path / "out", TINY, progress=False)
    assert not (tmp_path / "out").exists()


def test_settings_without_a_finished_run_do_not_block(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun, state = out / "seed-3" / "pretrained", out / "seed-3" / "pretrained" / "state-000000001.pt"

    def prepare(settings: CompareSettings, **how: bool) -> None:
        fastnull.experiments.compare._prepare(
            out, settings, "comparison", how.get("overwrite", False), how.get("resume", False)
        )

    prepare(TINY)
    begun.mkdir(parents=True)
    state.write_text("begun")
    for resume in (False, True):
        prepare(TINY, resume=resume)  # the same settings: it goes on
        assert state.exists()
    prepare(replace(TINY, seeds=3))  # the corrected command: it starts over
    assert not begun.exists()
    assert record_of(out)["settings"]["seeds"] == 3
    (out / "seed-3" / "none").mkdir(parents=True)
    (out / "seed-3" / "none" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a comparison already"):
        prepare(replace(TINY, seeds=3))
    with pytest.raises(ValueError, match=r"cannot resume the comparison in .* with other settings: seeds"):
        prepare(TINY, resume=True)
    assert (out / "seed-3" / "none" / "results.json").exists()
    prepare(TINY, overwrite=True)
    assert not (out / "seed-3").exists()


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
        "--pretrain-epochs", "1", "--budget", "9", "--eps", "8", "--pgd-steps", "1", "--images", "13", "--corruptions",
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
    assert "--resume goes on" in capsys.readouterr().err
