"""FinetuneConfig: the settings of a finetuning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fastnull.checks import as_type, check_choice, check_fields, check_number, refuse_renamed
from fastnull.data.cache import CACHES
from fastnull.encoder.frozen import BACKENDS
from fastnull.finetune.logs import LOGS
from fastnull.synthesis.config import ALL_MODES, IN_TRAINING, SynthesisConfig, recommended_fraction, recommended_site
from fastnull.vit import SITES

AUGMENTS = ("none", "random", "universal", "per_image", "boundary", "free", "adversarial", "trades")
"""`none` trains on clean images only; `random`, `adversarial` (PGD after Madry) and `trades` are controls; the
others are modes of NullspaceAugment."""
ATTACKS = ("adversarial", "trades")
NO_FRACTION = {"none": "has no noise", "trades": "compares two", "free": "has noise on half of the images in any case"}
"""Augmentations without `noise_fraction`, and why."""
SMALL_MODELS = ("vit_digits", "vit_photos")
LR, SMALL_LR = 5e-4, 4e-3
"""Default of the highest learning rate, and the one that docs/recipe.md found for SMALL_MODELS."""
RENAMED = {
    "train_ratio": "train_fraction",
    "noise_share": "noise_fraction",
    "eps": "noise.eps",
    "objective": "noise.objective",
    "limit": "noise.limit",
    "limit_spread": "noise.limit_range",
    "smooth_limit": "noise.smooth_limit",
    "noise_contrast": "noise.contrast",
    "noise_lr": "noise.lr",
    "noise_steps": "noise.steps",
    "noise_step_size": "noise.step_size",
    "noise_step_spread": "noise.step_range",
    "noise_preset": "noise.preset",
    "rounds": "noise.rounds",
    "image_ratio": "noise.image_fraction",
}
"""Names of version 0.1 → fields."""
REFRESH = {"universal": {"image_fraction": 0.1}}
"""Recommended in addition to IN_TRAINING: a bank is learned in every epoch from a tenth of the training batches, as
published."""
OF_THE_RUN = {"mode": "augment", "site": "site", "seed": "seed"}
"""Fields of `noise` that are also fields of the run: name there → name here."""


def recommended_lr(model: str | None) -> float:
    """The highest learning rate for a model of `create_model`; None: for any other model."""
    return SMALL_LR if model in SMALL_MODELS else LR


def option(default: Any, text: str) -> Any:
    """A field of FinetuneConfig with its documentation, which the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a finetuning run. Each field has its documentation as metadata.

    `noise` is a SynthesisConfig, or a mapping of some of its fields; the others then have the recommended values of
    `augment` and `site`, or with `{"preset": "finetune"}` the published ones.

    Raises:
        TypeError: a value of the wrong type (NumPy's numbers are accepted).
        ValueError: a value that is not allowed.
    """

    renamed = RENAMED

    # the model
    model: str = option("vit_digits", "timm model, vit_digits or vit_photos")
    num_classes: int | None = option(None, "number of classes; none: that of the data")
    pretrained: bool = option(False, "start from timm's pretrained weights")
    checkpoint: str | None = option(None, "file of weights to start from (.safetensors, .pth)")
    img_size: int | None = option(None, "height and width in pixels; none: the model's own")
    drop_path: float = option(0.0, "probability that a sample skips a residual branch in the last block")

    # the data
    data: str = option(
        "digits", "digits, photos, a folder with train/ and val/ (one folder per class), torch/... or hfds/..."
    )
    data_dir: str | None = option(None, "where timm keeps the data set")
    download: bool = option(False, "let timm download the data set")
    train_fraction: float = option(1.0, "fraction of the training images in an epoch, drawn for each epoch (0, 1]")
    val_fraction: float = option(0.1, "fraction of the training images held out to choose the best epoch [0, 1)")
    val_seed: int = option(0, "seed of that choice; apart from `seed`, so that runs have the same one")
    workers: int = option(0, "processes that load images; 0: the main process")
    cache: str = option(
        "auto",
        "image files: keep decoded images in memory. auto: if they have one size and fit; ram, device: also resized; "
        "none: decode them for each batch",
    )
    crop_scale: float = option(0.08, "image files: smallest area of the random crop, as a fraction of the image (0, 1]")
    hflip: float = option(0.5, "image files: probability of a horizontal flip")
    color_jitter: float = option(0.4, "image files: strength of the colour jitter; not used with auto_augment")
    auto_augment: str | None = option(None, "image files: timm's policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, "image files: probability of random erasing, with noise in place of pixels")

    # the augmentation
    augment: str = option("boundary", f"one of {', '.join(AUGMENTS)}")
    site: str = option(
        None, "where noise is added: patch, block0 or pixels; none: pixels for boundary and free, else patch"
    )
    noise: SynthesisConfig | None = field(
        default=None, metadata={"help": "how noise is made; none: the recommended recipe of augment and site"}
    )
    noise_fraction: float | None = option(
        None,
        "fraction of a batch that is noisy (or attacked), with one view per image; 0: a clean and a noisy view; "
        "none: 0.5 for boundary noise in pixels, else 0",
    )
    backend: str = option("auto", "of the frozen encoder")
    attack_eps: float = option(8 / 255, "adversarial, trades: radius of the L-infinity ball, pixels in [0, 1]")
    attack_steps: int = option(10, "adversarial, trades: steps of PGD, from a random start")
    attack_step_size: float = option(2 / 255, "adversarial, trades: step of PGD, pixels in [0, 1]")
    trades_beta: float = option(6.0, "trades: weight of the divergence between the clean and the attacked view")
    mixup: float = option(0.0, "alpha of Mixup; 0 is off")
    cutmix: float = option(0.0, "alpha of CutMix; 0 is off; with mixup one of both is drawn per batch")
    smoothing: float = option(0.0, "label smoothing [0, 1)")

    # the optimisation
    epochs: int = option(20, "epochs; ignored with compute_budget")
    compute_budget: float | None = option(
        None, "cost of the training in forward passes per training image (a clean epoch is 3); sets the steps"
    )
    batch_size: int = option(
        64, "images per step, over all processes; with augment free half of them are those of the step before"
    )
    accumulate: int = option(1, "number of equal parts of a process's images in a step, to save memory")
    opt: str = option("adamw", "timm optimiser")
    lr: float | None = option(None, "highest learning rate; none: 4e-3 for vit_digits and vit_photos, else 5e-4")
    min_lr: float = option(0.0, "learning rate at the end")
    weight_decay: float = option(0.05, "weight decay, not on biases and norms")
    sched: str = option("cosine", "learning rate over the steps: cosine or constant")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up, part of the epochs")
    layer_decay: float | None = option(None, "factor of the learning rate per layer, downwards (0, 1]")
    clip_grad: float | None = option(None, "largest L2 norm of the gradient")
    ema_decay: float | None = option(None, "decay of the averaged weights, warmed up as 1 - (1 + step)^(-2/3)")
    start_fraction: float = option(
        0.0, "fraction of the weights at the start in those that are evaluated and saved [0, 1)"
    )

    # the run
    device: str | None = option(None, "torch device; none: cuda if available, else cpu")
    amp: str | None = option(None, "autocast dtype: bfloat16 or float16; none: the dtype of the weights")
    channels_last: bool = option(
        False, "images, and (unless sharded) weights of convolutions, in torch's channels_last memory format"
    )
    shard: bool = option(False, "shard weights, gradients and moments over the processes (FSDP2), not only images")
    compile: bool = option(False, "train through torch.compile")
    seed: int = option(0, "of all random numbers except the choice of held-out images")
    label: str | None = option(None, "name of the run in reports; none: augmentation and site")
    out: str | None = option(None, "folder for weights, metrics and training state; none: nothing is written")
    overwrite: bool = option(False, "replace the run in the folder")
    resume: bool = option(False, "resume the run in the folder")
    force: bool = option(False, "with resume: allow settings that differ from the run's")
    checkpoint_every: int | None = option(None, "steps between training states; none: one per epoch")
    keep_last: int = option(2, "number of training states to keep")
    log_every: int = option(10, "steps between lines in metrics.jsonl")
    log: str | None = option(None, "where metrics go besides metrics.jsonl: tensorboard, wandb, trackio or mlflow")
    progress: bool = option(True, "show a progress bar")

    def __new__(cls, *_: Any, **given: Any) -> FinetuneConfig:
        refuse_renamed("FinetuneConfig", given, RENAMED)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_choice("augment", as_type("augment", self.augment, str), AUGMENTS)
        if self.site is None:
            given = self.noise.site if isinstance(self.noise, SynthesisConfig) else recommended_site(self.augment)
            object.__setattr__(self, "site", given)
        check_choice("site", as_type("site", self.site, str), SITES)
        self._resolve_noise()
        check_fields(self)
        check_choice("cache", self.cache, CACHES)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("sched", self.sched, ("cosine", "constant"))
        if self.amp is not None:
            check_choice("amp", self.amp, ("bfloat16", "float16"))
        if self.log is not None:
            check_choice("log", self.log, LOGS)
            if self.out is None:
                raise ValueError("log needs a folder too: give out")
        for name, low, high, exclusive in _RANGES:
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, low, high, exclusive=exclusive)
        for name in _BELOW_ONE:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be >= 0 and < 1; got {value!r}")
        if self.min_lr > self.highest_lr:
            raise ValueError(f"min_lr must be <= lr ({self.highest_lr:g}); got {self.min_lr:g}")
        if self.mixing and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix, which pair images; got {self.batch_size}")
        if self.noise_fraction and self.augment in NO_FRACTION:
            raise ValueError(
                f"noise_fraction is for augmentations of one view: {self.augment!r} {NO_FRACTION[self.augment]}"
            )
        if self.augment == "free" and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with augment 'free', half clean; got {self.batch_size}")
        if self.resume and self.overwrite:
            raise ValueError("give either resume or overwrite, not both")
        if self.force and not self.resume:
            raise ValueError("force needs resume")
        if (self.resume or self.overwrite) and self.out is None:
            raise ValueError("resume and overwrite need a folder: give out")

    def _resolve_noise(self) -> None:
        """Convert `noise`, if given, to a SynthesisConfig of this run."""
        if self.noise is None:
            return
        if self.augment not in ALL_MODES:
            raise ValueError(f"noise is for augment {', '.join(ALL_MODES)}; got augment={self.augment!r}")
        noise: Any = self.noise
        if isinstance(noise, Mapping):
            if noise.get("preset") is not None and self.augment != "universal":
                raise ValueError(f"noise.preset is for augment='universal'; got augment={self.augment!r}")
            own = {name: getattr(self, here) for name, here in OF_THE_RUN.items()}
            if noise.get("preset") is None:
                own |= IN_TRAINING.get(self.augment, {}) | REFRESH.get(self.augment, {})
            try:
                noise = SynthesisConfig.from_dict({**own, **noise})
            except (TypeError, ValueError) as error:
                raise type(error)(f"noise: {error}") from error
            if noise.seed != self.seed:
                raise ValueError(f"noise.seed is the run's seed, {self.seed}; got {noise.seed}")
        as_type("noise", noise, SynthesisConfig)
        for name in ("mode", "site"):
            here = OF_THE_RUN[name]
            if getattr(noise, name) != getattr(self, here):
                raise ValueError(f"noise.{name} must be {here} ({getattr(self, here)!r}); got {getattr(noise, name)!r}")
        object.__setattr__(self, "noise", replace(noise, seed=self.seed))

    @classmethod
    def published(cls, name: str = "vit_s", **changes: Any) -> FinetuneConfig:
        """The published recipe: about 800 steps of universal noise, ε 0.03, limit 3, on 0.4 % of ImageNet per epoch.

        The published global batch is 128 (8 per device). The checkpoints are those of timm 0.4 under these names; the
        paper does not state which one was used. `data`, `out` and `device` are not set.

        Args:
            name: `vit_s`, `vit_b`: those runs; `madry`: the adversarial baseline of ViT-S, PGD-10 at 8/255.
            changes: fields to change.
        """
        small, base = (f"vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("small", "base"))
        common = cls(
            model=small, pretrained=True, data="torch/imagenet", train_fraction=0.004, epochs=20, lr=1e-5, min_lr=1e-6,
            augment="universal", noise=SynthesisConfig.published("finetune"),
        )  # fmt: skip
        regularised: dict[str, Any] = {
            "batch_size": 128, "weight_decay": 0.05, "drop_path": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
            "auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "amp": "float16",
        }  # fmt: skip
        presets: dict[str, dict[str, Any]] = {
            "vit_s": regularised,
            "vit_b": {**regularised, "model": base},
            "madry": {"augment": "adversarial", "noise": None, "weight_decay": 1e-4, "color_jitter": 0.0},
        }
        return replace(common, **{**presets[check_choice("preset", name, presets)], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneConfig:
        """The inverse of `to_dict`. Raises TypeError for old names, and ValueError that names unknown fields."""
        refuse_renamed("FinetuneConfig", values, RENAMED)
        known = [entry.name for entry in fields(cls)]
        for name in values:
            check_choice("field", name, known)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-able."""
        return asdict(self)

    def image_settings(self) -> dict[str, Any]:
        """The settings of `View.training`."""
        return {name: getattr(self, name) for name in ("crop_scale", "hflip", "color_jitter", "auto_augment", "reprob")}

    @property
    def mixing(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def fraction(self) -> float:
        """`noise_fraction`, or the recommended one."""
        return recommended_fraction(self.augment, self.site) if self.noise_fraction is None else self.noise_fraction

    @property
    def highest_lr(self) -> float:
        """`lr`, or the default of the model."""
        return recommended_lr(self.model) if self.lr is None else self.lr

    def synthesis(self) -> SynthesisConfig | None:
        """The settings of NullspaceAugment; None if the augmentation is not one of its modes."""
        if self.augment not in ALL_MODES:
            return None
        refresh = REFRESH.get(self.augment, {})
        return self.noise or SynthesisConfig.recommended(self.augment, self.site, seed=self.seed, **refresh)


_RANGES: tuple[tuple[str, float | None, float | None, bool], ...] = (
    # field, minimum, maximum, whether the minimum is excluded
    ("num_classes", 1, None, False), ("img_size", 1, None, False), ("epochs", 1, None, False),
    ("batch_size", 1, None, False), ("accumulate", 1, None, False),
    ("attack_steps", 1, None, False), ("trades_beta", 0, None, False),
    ("checkpoint_every", 1, None, False), ("keep_last", 1, None, False),
    ("log_every", 1, None, False), ("workers", 0, None, False), ("train_fraction", 0, 1, True),
    ("crop_scale", 0, 1, True), ("hflip", 0, 1, False), ("color_jitter", 0, None, False), ("reprob", 0, 1, False),
    ("noise_fraction", 0, 1, False),
    ("attack_eps", 0, 1, True), ("attack_step_size", 0, 1, True), ("mixup", 0, None, False),
    ("cutmix", 0, None, False), ("compute_budget", 0, None, True), ("lr", 0, None, True), ("min_lr", 0, None, False),
    ("weight_decay", 0, None, False), ("warmup_epochs", 0, None, False), ("layer_decay", 0, 1, True),
    ("clip_grad", 0, None, True),
)  # fmt: skip
_BELOW_ONE = ("drop_path", "val_fraction", "smoothing", "ema_decay", "start_fraction")
