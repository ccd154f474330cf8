"""CompareSettings: what is refused and where the message points; recipes; the start and the evaluations."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from fastnull.experiments.settings import AS_IN_EVALUATE, RECIPES, CompareSettings
from fastnull.finetune.plan import step_cost
from fastnull.robustness.settings import EvaluationSettings


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
            "norm_of is for random noise",
        ),
        ({"methods": ("universal", "universal")}, "methods must differ"),
        ({"methods": ()}, "at least one"),
        ({"split": "train"}, "split must be one of"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": True}, "seeds must be an integer"),
        ({"budget": "156"}, "budget must be a number"),
        ({"budget": 0}, "budget must be > 0"),
        ({"lr": -1.0}, "lr must be > 0"),
        ({"start_lr": float("nan")}, "start_lr must be a number"),
        ({"start_epochs": -1}, "start_epochs must be >= 0"),
        ({"pretrain_epochs": 1}, "pretrain_epochs is now start_epochs"),
        ({"pretrained": True, "checkpoint": "x"}, "pretrained and checkpoint exclude each other"),
        ({"suites": ("clean", "pdg")}, "Did you mean 'pgd'"),
        ({"suites": ()}, "suites must name at least one"),
        ({"suites": ("noise",)}, "suite noise needs noise"),
        ({"suites": ("imagenet-c",)}, "suite imagenet-c needs root"),
        ({"suites": ("imagenet-r",), "root": "x", "split": "held-out"}, "leave out suite imagenet-r"),
        ({"costly_images": 0}, "costly_images must be >= 1"),
        ({"severities": ()}, "severities must name at least one"),
        ({"eps": (8 / 255,)}, "eps is in units of 1/255 here: 8 is 8/255; got 0.0313"),
        ({"common": {"lr": 1.0}}, "common cannot have lr"),
        ({"common": {"seed": 1}}, "common cannot have seed"),
        ({"common": {"crop_scale": 2.0}}, "common: crop_scale must be"),
        ({"common": {"crop": 0.5}}, "common: field must be one of"),
        ({"pgd_steps": 0}, "pgd_steps must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"images": 0}, "images must be >= 1"),
        ({"corruptions": ("fgo",)}, "Did you mean 'fog'"),
        ({"corruptions": ()}, "corruptions must name at least one"),
        ({"corruptions": "fog"}, "corruptions must be a tuple"),
        ({"corruption_size": 8}, "corruption_size must be >= 16"),
        ({"restarts": 0}, "restarts must be >= 1"),
        ({"severities": (0,)}, "severities must be among 1, 2, 3, 4, 5; got 0"),
        ({"severities": (6,)}, "severities must be among 1, 2, 3, 4, 5; got 6"),
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
            "norm of its own; x has norm_of too",
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
    "../x", "a/b", "/x", ".", "..", ".hidden", "a\\b", "", " ", "x.", "x ", "a|b", "a\nb", "a\0b", "-x", "start",
    "Start", "x" * 81,
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_folders(name: str) -> None:
    for methods in ((name,), ("none",)):  # also where it does not run
        with pytest.raises(ValueError, match="a method's name is also a folder name"):
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
    with pytest.raises(ValueError, match=f"recipe of x: {field} cannot be in a recipe"):
        CompareSettings(methods=("x",), recipes={"x": {"augment": "none", field: value}})


def test_a_comparison_has_what_evaluate_has() -> None:
    own, theirs = ({entry.name for entry in fields(kind)} for kind in (CompareSettings, EvaluationSettings))
    # steps is pgd_steps, limit is images; the others are set by the comparison
    assert theirs - own == {"norm", "steps", "seed", "out", "resume", "progress", "limit"}
    given: dict[str, Any] = {
        "restarts": 2, "final_iterate": True, "corruptions": ("fog",), "corruption_size": 32, "severities": (2,),
        "root": "sets", "frost_folder": "frost", "skip_bad": True, "workers": 1,
    }  # fmt: skip
    assert set(given) == set(AS_IN_EVALUATE)
    for each in CompareSettings(images=5, **given).evaluations():
        assert {name: getattr(each, name) for name in given} == given


def test_suites_with_the_same_number_of_images_go_together() -> None:
    suites = ("clean", "pgd", "apgd_t", "corruptions")
    found = [
        (each.suites, each.limit) for each in CompareSettings(suites=suites, images=50, costly_images=20).evaluations()
    ]
    assert found == [(("clean",), None), (("pgd", "corruptions"), 50), (("apgd_t",), 20)]
    (alone,) = CompareSettings(suites=suites).evaluations()
    assert alone.suites == suites
    assert [each.limit for each in CompareSettings(suites=suites, images=50).evaluations()] == [None, 50]


@pytest.mark.parametrize(
    ("kind", "given", "epochs"),
    [("random", None, 40), ("new head", None, 2), ("trained", None, None), ("trained", 3, 3), ("trained", 0, None)],
)
def test_what_the_start_trains(kind: str, given: int | None, epochs: int | None) -> None:
    start = CompareSettings(model="vit_small_patch16_224", start_epochs=given, lr=1e-4).start(kind, 7)
    assert (None if start is None else start.epochs) == epochs
    assert start is None or (start.augment, start.lr, start.seed) == ("none", 1e-4, 7)


@pytest.mark.parametrize("kind", ["random", "new head"])
def test_a_start_that_is_needed(kind: str) -> None:
    with pytest.raises(ValueError, match=r"start_epochs must be >= 1 where the (weights are random|head is new)"):
        CompareSettings(start_epochs=0).start(kind, 0)


def test_warmup_leaves_most_of_a_short_run() -> None:
    assert CompareSettings().configuration("none").warmup_epochs == 2
    assert CompareSettings(budget=9).configuration("none").warmup_epochs == pytest.approx(0.2 * 9 / 3)
