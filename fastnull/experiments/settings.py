"""CompareSettings: what a comparison trains and measures; RECIPES: its built-in methods."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch

from fastnull.checks import check_choice, check_fields, check_number, refuse_renamed
from fastnull.data.sources import EMBEDDED
from fastnull.finetune.config import SMALL_MODELS, FinetuneConfig
from fastnull.finetune.plan import step_cost
from fastnull.paths import same_setting
from fastnull.robustness import DEMO_CORRUPTIONS
from fastnull.robustness.settings import EvaluationSettings
from fastnull.robustness.suites import FOLDER_SUITES

NORM_OF = "norm_of"
"""Key in a recipe of random noise: the method whose mean L2 norm the noise has, measured in the run of the same seed.
The limits of the noise are scaled to reach it."""

RECIPES: dict[str, dict[str, Any]] = {
    # method → changes to the shared configuration; settings chosen on held-out splits, see docs/recipe.md
    "none": {"augment": "none"},
    "random": {"augment": "random"},
    "random-tokens": {"augment": "random", "noise": {"contrast": 0.0}, NORM_OF: "boundary-tokens"},
    "random-pixels": {"augment": "random", "site": "pixels", "noise_fraction": 0.5, NORM_OF: "boundary-pixels"},
    # the start of boundary-pixels, without any steps
    "random-smooth": {
        "augment": "random", "site": "pixels", "noise_fraction": 0.5,
        "noise": {"limit": 8 / 255, "smooth_limit": 48 / 255, "contrast": 0.2}, NORM_OF: "boundary-pixels",
    },
    # AdamW from a start that meets ε on the small models within the updates of a budget
    "universal": {"augment": "universal", "noise": {"lr": 0.2, "image_fraction": 1.0}},
    "per_image": {"augment": "per_image"},
    "boundary-tokens": {"augment": "boundary", "site": "patch", "noise": {"eps": 0.6}},
    # the default: one view, half of the images noisy
    "boundary-pixels": {"augment": "boundary"},
    "free": {"augment": "free"},
    # one step from a random start (Wong et al. 2020) for half of the images, each seen once: at equal compute this was
    # better than three steps, and better than two views
    "adversarial": {
        "augment": "adversarial", "noise_fraction": 0.5, "attack_eps": 8 / 255, "attack_steps": 1,
        "attack_step_size": 8 / 255,
    },
    # β 1, as in the published comparison: with so few steps, β 6 ends in constant predictions
    "trades": {
        "augment": "trades", "attack_eps": 8 / 255, "attack_steps": 1, "attack_step_size": 8 / 255, "trades_beta": 1.0,
    },
}  # fmt: skip

RENAMED_METHODS = {"clean-only": "none", "per-image": "per_image"}
START = "start"
"""Name of the folder with the training that all methods of a seed start from."""
SPLITS = ("test", "held-out")
GROWING = ("methods", "recipes", "seeds", "first_seed")
"""Fields that may change when a comparison is resumed, as long as its finished runs remain part of it."""
HELD_OUT = 0.2
"""Fraction of the training images that the split `held-out` excludes from training."""
AS_IN_EVALUATE = (
    "restarts", "final_iterate", "corruptions", "corruption_size", "severities", "root", "frost_folder", "skip_bad",
    "workers",
)  # fmt: skip
"""Fields of EvaluationSettings with the same name and meaning in CompareSettings."""
COSTLY = ("apgd", "apgd_t", "autoattack", "cw", "patch")
"""Suites limited by `costly_images`."""
WARMUP_EPOCHS, WARMUP_FRACTION = 2, 0.2
"""Warm-up epochs of a finetuning run, and the largest fraction of the run that they may take."""
START_EPOCHS = {"random": 40, "new head": 2, "trained": 0}
"""Default epochs of the start, by the kind of the weights."""
SMALL_START_LR = 2e-3
"""Default learning rate of the start for SMALL_MODELS."""

_OF_ALL = frozenset(
    {"model", "num_classes", "img_size", "pretrained", "checkpoint", "data", "data_dir", "download", "val_fraction"}
    | {"val_seed", "epochs", "compute_budget", "device", "shard", "seed", "label", "log", "progress"}
    | {"out", "overwrite", "resume", "force", "keep_last", "checkpoint_every"}
)
"""Fields of FinetuneConfig that are the same for all methods of a comparison, or that the comparison sets itself."""
_OWN = frozenset({"lr", "layer_decay", "batch_size", "workers", "augment", "site", "noise", "warmup_epochs"})
"""Further fields that `common` cannot have: CompareSettings or the recipes set them."""
_NAME = re.compile(r"\w([\w .+=,()-]{0,78}[\w+)])?")


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison.

    Attributes:
        model: timm model, vit_digits or vit_photos; none: the small model of digits or photos.
        checkpoint: file of weights that every seed starts from (.safetensors, .pth).
        pretrained: every seed starts from timm's pretrained weights.
        num_classes: classes of the head; none: those of the data.
        img_size: height and width in pixels; none: the model's own.
        data: digits, photos, a folder with train/ and val/ (one folder a class), or torch/NAME or hfds/NAME.
        data_dir: where timm keeps the data set.
        download: let timm download the data set.
        methods: names in RECIPES or in `recipes`.
        recipes: further methods, name → fields of FinetuneConfig; random noise may have `norm_of`, see NORM_OF.
        common: fields of FinetuneConfig that all trainings share, such as crop_scale.
        seeds: number of seeds; all methods of a seed have the same start.
        first_seed: the first seed; the others follow. Choose settings on seeds that the final table does not use.
        split: test, or held-out: a fifth of the training images, kept out of training, to choose settings on.
        start_epochs: epochs of clean training before the methods, shared by those of a seed; none: 40 from random
            weights, 2 where the head is new, else 0.
        start_lr: highest learning rate of the start; none: 2e-3 for vit_digits and vit_photos, else lr.
        budget: compute of each finetuning run, in forward passes per training image; 156 are 52 clean epochs, or 34.7
            epochs of boundary noise in pixels with its defaults.
        lr: highest learning rate of each finetuning; none: 4e-3 for vit_digits and vit_photos, else 5e-4.
        layer_decay: factor on the learning rate from each layer to the one below (0, 1].
        batch_size: images per step in all trainings.
        suites: suites of `evaluate` to measure.
        eps: radii of the attacks in 1/255 of the pixel range, L-infinity.
        pgd_steps: steps of PGD, MI-FGSM and APGD.
        restarts: of PGD and APGD.
        final_iterate: judge attacks by their last point, as other libraries do, instead of the worst one.
        corruptions: names of fastnull.robustness.CORRUPTIONS.
        corruption_size: pixels at which image files are corrupted, before they are resized for the model; 32 has
            CIFAR-10-C's constants; none: the model's size.
        severities: severities of the corruptions, 1 to 5.
        images: test images for all suites but clean, drawn evenly from all classes; none: all. Suite clean always
            takes all.
        costly_images: the same for apgd, apgd_t, autoattack, cw and patch; none: `images`.
        root: folder of the published test sets, for suites such as imagenet-c and cifar10-c.
        frost_folder: folder of pictures for the corruption frost; none: those that the package generates.
        skip_bad: skip and list unreadable image files of the evaluation; false: raise an error.
        noise: file with the noise of suite noise, from `fastnull synthesize`.
        eval_batch_size: batch size of the evaluation.
        workers: processes that load images; 0 loads in the main process.
        device: torch device; none: the CPU for digits and photos, else cuda if available.
        keep_weights: keep the weights of a run after its evaluation.

    Raises:
        TypeError: a field of another type.
        ValueError: a value that is not allowed; an unknown method, or a name that cannot be a folder name; a recipe
            that is not valid, or sets fields that all methods share.
    """

    renamed: ClassVar[Mapping[str, str]] = {"pretrain_epochs": "start_epochs", "pretrain_lr": "start_lr"}

    model: str | None = None
    checkpoint: str | None = None
    pretrained: bool = False
    num_classes: int | None = None
    img_size: int | None = None
    data: str = "digits"
    data_dir: str | None = None
    download: bool = False
    methods: tuple[str, ...] = tuple(RECIPES)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5
    first_seed: int = 0
    split: str = "test"
    start_epochs: int | None = None
    start_lr: float | None = None
    budget: float = 156.0
    lr: float | None = None
    layer_decay: float | None = None
    batch_size: int = 64
    suites: tuple[str, ...] = ("clean", "fgsm", "pgd", "corruptions")
    eps: tuple[float, ...] = (1, 2, 4, 8)
    pgd_steps: int = 10
    restarts: int = 1
    final_iterate: bool = False
    corruptions: tuple[str, ...] = DEMO_CORRUPTIONS
    corruption_size: int | None = None
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    images: int | None = None
    costly_images: int | None = None
    root: str | None = None
    frost_folder: str | None = None
    skip_bad: bool = False
    noise: str | None = None
    eval_batch_size: int = 256
    workers: int = 0
    device: str | None = None
    keep_weights: bool = True

    def __new__(cls, *_: Any, **given: Any) -> CompareSettings:
        refuse_renamed("CompareSettings", given, cls.renamed)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("split", self.split, SPLITS)
        for name, low in (("seeds", 1), ("first_seed", 0), ("start_epochs", 0), ("pgd_steps", 1)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low)
        check_number("budget", self.budget, 0, exclusive=True)
        for name in ("images", "costly_images"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1)
        if self.start_lr is not None:
            check_number("start_lr", self.start_lr, 0, exclusive=True)
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint exclude each other: both bring weights")
        self._check_evaluation()
        for name in (*self.recipes, *self.methods):
            _check_name(name)
        if not self.methods:
            raise ValueError("methods must name at least one")
        if len({name.lower() for name in self.methods}) < len(self.methods):
            raise ValueError(f"methods must differ; got {', '.join(self.methods)}")
        for name in self.common:
            if name in _OF_ALL | _OWN:
                raise ValueError(f"common cannot have {name}: the comparison or its recipes set it")
        self.clean()
        for method in dict.fromkeys((*self.recipes, *self.methods)):
            self.configuration(method)
        for method in self.methods:
            other = self.recipe(method).get(NORM_OF)
            if other is not None:
                self._check_other(method, other)

    def _check_evaluation(self) -> None:
        for name in ("suites", "eps", "corruptions", "severities"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for radius in self.eps:
            check_number("eps", radius, 0, 255)
            if 0 < radius < 0.1:
                raise ValueError(f"eps is in units of 1/255 here: 8 is 8/255; got {radius:g}")
        list(self.evaluations())  # EvaluationSettings checks the rest
        for suite, needed in (("noise", "noise"), *((name, "root") for name in self._folder_suites)):
            if suite in self.suites and getattr(self, needed) is None:
                raise ValueError(f"suite {suite} needs {needed}")
        if self._folder_suites and self.split == "held-out":
            raise ValueError(f"split held-out measures training images: leave out suite {self._folder_suites[0]}")

    def _check_other(self, method: str, other: Any) -> None:
        """Check the method that a recipe names in NORM_OF: it must run too, add noise, and have no NORM_OF itself."""
        if other not in self.methods:
            raise ValueError(f"method {method} takes the norm of {other}, which must be among the methods too")
        if NORM_OF in self.recipe(other) or self.configuration(other).augment == "none":
            why = f"has {NORM_OF} too" if NORM_OF in self.recipe(other) else "adds no noise"
            raise ValueError(f"recipe of {method}: {NORM_OF} must name a method with a norm of its own; {other} {why}")

    def recipe(self, method: str) -> Mapping[str, Any]:
        """The changes to the configuration for a method. Raises ValueError for an unknown one."""
        known = {**RECIPES, **self.recipes}
        if method in RENAMED_METHODS and method not in known:
            raise ValueError(f"method {method} is called {RENAMED_METHODS[method]} since version 0.2")
        return known[check_choice("method", method, known)]

    def configuration(self, method: str, **changes: Any) -> FinetuneConfig:
        """A method's configuration, with `changes`. Raises ValueError, TypeError for a recipe that is not valid."""
        recipe = self.recipe(method)
        for name in recipe:
            if name in _OF_ALL:
                raise ValueError(
                    f"recipe of {method}: {name} cannot be in a recipe: all methods of a comparison share it"
                )
        own = {name: value for name, value in recipe.items() if name != NORM_OF}
        config = _configuration(f"recipe of {method}", {**self._shared(), **changes, **own})
        if NORM_OF in recipe and config.augment != "random":
            raise ValueError(f"recipe of {method}: {NORM_OF} is for random noise; got augment={config.augment!r}")
        if "warmup_epochs" in own:
            return config
        epochs = self.budget / step_cost(config)
        return replace(config, warmup_epochs=min(WARMUP_EPOCHS, WARMUP_FRACTION * epochs))

    def start(self, kind: str, seed: int, **changes: Any) -> FinetuneConfig | None:
        """The configuration of the clean training before the methods; None if there is none.

        Args:
            kind: kind of the weights, a key of START_EPOCHS.
            seed: seed of the run.
            changes: further fields.

        Raises:
            ValueError: start_epochs is 0, but the weights or the head are not trained.
        """
        epochs = START_EPOCHS[kind] if self.start_epochs is None else self.start_epochs
        if epochs == 0:
            if kind != "trained":
                what = "the weights are random" if kind == "random" else "the head is new"
                raise ValueError(f"start_epochs must be >= 1 where {what}; got 0")
            return None
        lr = self.start_lr or (SMALL_START_LR if self.network in SMALL_MODELS else self.lr)
        own = {"epochs": epochs, "lr": lr, "warmup_epochs": 0.3 * epochs, "start_fraction": 0.0}
        return self.clean(**own, seed=seed, **changes)

    def clean(self, **changes: Any) -> FinetuneConfig:
        """The configuration of training on clean images, with `changes`."""
        return _configuration("common", {**self._shared(), "augment": "none", **changes})

    def _shared(self) -> dict[str, Any]:
        """Fields that all trainings share."""
        return {
            **self.common,
            "model": self.network, "data": self.data, "data_dir": self.data_dir, "download": self.download,
            "num_classes": self.num_classes, "img_size": self.img_size, "batch_size": self.batch_size, "lr": self.lr,
            "layer_decay": self.layer_decay, "val_fraction": HELD_OUT if self.split == "held-out" else 0.0,
            "workers": self.workers, "device": self.where, "keep_last": 1, "progress": False,
        }  # fmt: skip

    def evaluations(self, **changes: Any) -> Iterator[EvaluationSettings]:
        """The evaluations of a model, one for all suites with the same number of images."""
        costly = self.images if self.costly_images is None else self.costly_images
        limits = {
            suite: costly if suite in COSTLY else None if suite == "clean" else self.images for suite in self.suites
        }
        same: dict[str, Any] = {name: getattr(self, name) for name in AS_IN_EVALUATE}
        for limit in dict.fromkeys(limits.values()):
            yield EvaluationSettings(
                suites=tuple(suite for suite in limits if limits[suite] == limit),
                limit=limit, eps=tuple(radius / 255 for radius in self.eps), steps=self.pgd_steps,
                batch_size=self.eval_batch_size, progress=False, **same, **changes,
            )  # fmt: skip

    @property
    def network(self) -> str:
        """The name of the model; empty if none is given."""
        return self.model or (EMBEDDED[self.data].model if self.data in EMBEDDED else "")

    @property
    def where(self) -> str:
        """The device."""
        if self.device is not None:
            return self.device
        return "cuda" if self.data not in EMBEDDED and torch.cuda.is_available() else "cpu"

    @property
    def seed_list(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def _folder_suites(self) -> list[str]:
        return [suite for suite in self.suites if suite in FOLDER_SUITES]


def changed(before: CompareSettings, now: CompareSettings) -> list[str]:
    """What differs between two settings, except in GROWING."""
    one, other = plain(asdict(before)), plain(asdict(now))
    return [
        f"{name} (was {one[name]!r}, now {value!r})"
        for name, value in other.items()
        if name not in GROWING and not same_setting(one[name], value)
    ]


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as in a JSON file: tuples become lists."""
    return json.loads(json.dumps(values))


def _configuration(where: str, values: Mapping[str, Any]) -> FinetuneConfig:
    """Make a FinetuneConfig; error messages begin with `where` the values come from."""
    try:
        return FinetuneConfig.from_dict(dict(values))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def _check_name(name: str) -> None:
    """Raise ValueError for a method name that cannot be a folder name on every system, or an entry in tables."""
    if not _NAME.fullmatch(name) or name.lower() == START:
        raise ValueError(
            f"a method's name is also a folder name: it must begin with a letter or digit, hold only letters, digits, "
            f"spaces and . _ - + = , ( ), not end in a dot, and not be {START!r}; got {name!r}"
        )
