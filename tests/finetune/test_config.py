"""FinetuneConfig: bad settings, defaults, old names and the published recipe."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
from torch import nn

from fastnull.augment import NullspaceAugment
from fastnull.finetune import FinetuneConfig, finetune
from fastnull.finetune.config import RENAMED
from fastnull.finetune.plan import make_plan
from fastnull.models import create_model
from fastnull.synthesis.config import ALL_MODES, SynthesisConfig
from fastnull.vit import SITES
from tests.finetune.runs import (
    SMALL,
)

BAD_SETTINGS = {
    "augment": ({"augment": "boundry"}, "augment must be one of .* Did you mean 'boundary'"),
    "site": ({"site": "logits"}, "site must be"),
    "eps": ({"noise": {"eps": 0.0}}, "noise: eps must be > 0"),
    "limit": ({"noise": {"limit": -0.1}}, "noise: limit must be >= 0"),
    "limit in tokens": ({"noise": {"limit": 3.0}}, "noise: limit must be >= 0 and <= 1"),
    "noise steps": ({"noise": {"steps": 0}}, "noise: steps must be >= 1"),
    "noise field": ({"noise": {"step": 1}}, "noise: field must be one of .* Did you mean 'steps'"),
    "noise of another mode": ({"noise": SynthesisConfig()}, r"noise.mode must be augment \('boundary'\)"),
    "noise at another site": ({"noise": {"site": "block0"}}, r"noise.site must be site \('pixels'\); got 'block0'"),
    "noise of another seed": ({"noise": {"seed": 1}}, r"noise.seed is the run's seed, 0; got 1"),
    "no noise": ({"augment": "none", "noise": {"eps": 0.1}}, "noise is for augment .*; got augment='none'"),
    "attack_steps": ({"attack_steps": 0}, "attack_steps must be >= 1"),
    "attack_eps": ({"attack_eps": 8.0}, "attack_eps must be > 0 and <= 1"),
    "epochs": ({"epochs": 0}, "epochs must be >= 1"),
    "lr": ({"lr": float("nan")}, "lr must be a number or None; got nan"),
    "min_lr": ({"min_lr": 1.0}, "min_lr must be <= lr"),
    "odd": ({"mixup": 0.1, "batch_size": 5}, "batch_size must be even"),
    "smoothing": ({"smoothing": 1.0}, "smoothing must be >= 0 and < 1"),
    "start_fraction": ({"start_fraction": 1.0}, "start_fraction must be >= 0 and < 1"),
    "amp": ({"amp": "float8"}, "amp must be one of"),
    "preset": ({"noise": {"preset": "finetune"}}, "noise.preset is for augment='universal'"),
    "both": ({"resume": True, "overwrite": True}, "either resume or overwrite"),
    "force": ({"force": True}, "force needs resume"),
    "nowhere": ({"resume": True}, "give out"),
    "a fraction of an epoch": ({"epochs": 2.5}, r"epochs must be an integer; got 2\.5"),
    "no noise, one view": ({"augment": "none", "noise_fraction": 0.5}, "for augmentations of one view: 'none' has no"),
    "two views, one view": (
        {"augment": "trades", "noise_fraction": 0.5},
        "for augmentations of one view: 'trades' com",
    ),
    "more than all": ({"noise_fraction": 1.1}, "noise_fraction must be >= 0 and <= 1"),
    "infinite": ({"compute_budget": math.inf}, "compute_budget must be > 0; got inf"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case):
    changes, message = BAD_SETTINGS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        FinetuneConfig(**changes)


def test_every_setting_is_documented_and_survives_a_file():
    assert all(entry.metadata.get("help") for entry in fields(FinetuneConfig))
    config = FinetuneConfig(lr=0.25, augment="universal")
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="Did you mean 'lr'"):
        FinetuneConfig.from_dict({"lrr": 1.0})


@pytest.mark.parametrize("augment", ALL_MODES)
def test_defaults_are_one_recipe(augment):
    """Of a run, of NullspaceAugment, and of a SynthesisConfig of that mode and site, but for what a run affords."""
    config = FinetuneConfig(augment=augment)
    assert config.site == ("pixels" if augment in ("boundary", "free") else "patch")
    model = create_model("vit_digits")
    aug = NullspaceAugment(model, augment)
    in_training = {"steps": 3} if augment == "per_image" else {}
    assert aug.config == SynthesisConfig(mode=augment, site=config.site, **in_training)
    a_tenth = {"image_fraction": 0.1} if augment == "universal" else {}
    assert config.synthesis() == replace(aug.config, **a_tenth)
    assert FinetuneConfig(augment=augment, noise={"limit": 0.5}).synthesis() == replace(config.synthesis(), limit=0.5)
    assert SynthesisConfig(mode="per_image").steps == 30
    assert (config.fraction, aug.fraction) == ((0.5, 0.5) if augment == "boundary" else (0, 0))
    for site in ("pixels",) if augment == "free" else SITES:
        recipe = SynthesisConfig(mode=augment, site=site)
        assert recipe.limit <= 1 or (augment, site) in (("universal", "patch"), ("universal", "block0"))
        assert (recipe.smooth_limit > 0) == (augment in ("boundary", "free") and site == "pixels")


def test_the_learning_rate_is_that_of_the_model(tmp_path, few):
    assert FinetuneConfig().highest_lr == FinetuneConfig(model="vit_photos").highest_lr == 4e-3
    assert FinetuneConfig(model="vit_tiny_patch16_224").highest_lr == 5e-4
    assert FinetuneConfig(lr=0.1).highest_lr == 0.1
    config = replace(SMALL, lr=None, epochs=1, num_classes=10)
    own = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    for name, model, lr in (("named", None, 4e-3), ("made", create_model("vit_digits"), 4e-3), ("own", own, 5e-4)):
        finetune(replace(config, out=str(tmp_path / name)), model, few)
        # the record has the rate that was used
        assert json.loads((tmp_path / name / "config.json").read_text())["config"]["lr"] == lr


@pytest.mark.parametrize("name", RENAMED)
def test_old_names_show_the_new_ones(name):
    message = f"{name} is now {RENAMED[name]}"
    with pytest.raises(TypeError, match=message):
        FinetuneConfig(**{name: 1})
    with pytest.raises(TypeError, match=message):
        FinetuneConfig.from_dict({name: 1})


def test_published_recipe():
    config = FinetuneConfig.published("vit_s", data="images")
    assert (config.lr, config.min_lr, config.epochs, config.train_fraction) == (1e-5, 1e-6, 20, 0.004)
    synthesis = config.synthesis()
    assert synthesis is not None
    assert (synthesis.eps, synthesis.limit, synthesis.lr) == (0.03, 3, 0.1)
    assert (synthesis.rounds, synthesis.image_fraction) == (3, 0.1)
    assert (synthesis.objective, synthesis.weight_decay, synthesis.stop) == ("l2_squared", 0.01, "batch")
    # ImageNet: 40 steps an epoch (the published loop's off-by-one makes it 41), 800 in all
    plan = make_plan(replace(config, val_fraction=0.0), 1_281_167)
    assert (plan.batch_size, plan.steps_per_epoch, plan.steps) == (128, 40, 800)
    assert FinetuneConfig.published("madry").synthesis() is None
    with pytest.raises(ValueError, match="preset must be one of"):
        FinetuneConfig.published("vit_l")
