"""SynthesisConfig: the settings of a synthesis, what they may be, and the recommended ones of every mode and site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fastnull.checks import as_type, check_choice, check_fields, check_number, refuse_renamed
from fastnull.synthesis.objective import OBJECTIVES, PREDICTION
from fastnull.vit.base import SITES

MODES = ("universal", "per_image", "boundary")
"""The modes of a synthesis."""
ALL_MODES: tuple[str, ...] = (*MODES, "free", "random")
"""And those that NullspaceAugment alone has: `free`, see fastnull.synthesis.free, and `random`, the random start."""
MOST_NOISES = 100_000
"""Most noises in a bank. Each costs a pass over a batch of images in every step."""
ON_UNMET = ("keep", "scale", "raise")
SCHEDULES = ("cosine", "constant", "published")
SOLVERS = ("gauss_newton", "adamw")
LR = 0.1
DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAST_EPS_IN_16_BITS = 0.01
"""Below it `auto` keeps the model's dtype: rounding to bfloat16 alone has an influence of up to 3e-4."""
STOPS = ("check", "batch", "never")

_IN_TOKENS: dict[str, Any] = {"contrast": 1.0}
_IN_PIXELS: dict[str, Any] = {
    "limit": 8 / 255, "step_size": 12 / 255, "step_range": 1.0, "smooth_limit": 48 / 255, "contrast": 0.2,
}  # fmt: skip
RECOMMENDED: dict[tuple[str, bool], dict[str, Any]] = {
    # (mode, in pixels): lengths as multiples of the tokens' standard deviation, or in pixels in [0, 1]
    ("boundary", False): {**_IN_TOKENS, "eps": 0.1, "limit": 0.5, "steps": 3},
    ("boundary", True): {**_IN_PIXELS, "eps": 0.6, "steps": 1, "objective": "prediction"},
    ("free", True): {**_IN_PIXELS, "eps": 0.2},
    ("per_image", False): {**_IN_TOKENS, "limit": 1.0, "steps": 30},
    ("per_image", True): {"limit": 8 / 255, "steps": 30, "lr": 2 / 255},
    ("universal", False): {**_IN_TOKENS, "limit": 1.0},
    ("universal", True): {"limit": 16 / 255, "lr": 2 / 255},
    ("random", False): {**_IN_TOKENS, "limit": 1.0},
    ("random", True): {"limit": 8 / 255},
}  # fmt: skip
"""Values of settings that are None, by mode and site; no other place holds them. Those of boundary noise in pixels come
from the search in docs/recipe.md. Settings that are not listed are in _OTHERWISE."""
IN_TRAINING: dict[str, dict[str, Any]] = {"per_image": {"steps": 3}}
"""Changes by mode for noise that is made in every training step, which cannot wait until ε is met."""
_OTHERWISE: dict[str, Any] = {
    "eps": 0.03, "step_range": 0.0, "smooth_limit": 0.0, "contrast": 0.0, "objective": "l2",
}  # fmt: skip
_RECOMMENDED: Any = None
"""Default of the fields that are never None after __init__."""
FRACTIONS = {("boundary", True): 0.5}
"""Recommended fraction of noisy images in a batch, by (augment, in pixels); otherwise 0 (clean and noisy views)."""


def recommended_site(augment: str) -> str:
    """The default site: pixels for boundary and free noise, otherwise the patch embedding."""
    return "pixels" if augment in ("boundary", "free") else "patch"


def recommended_fraction(augment: str, site: str) -> float:
    """The default fraction of noisy images in a batch, see FRACTIONS."""
    return FRACTIONS.get((augment, site == "pixels"), 0.0)


RENAMED = {"image_ratio": "image_fraction", "limit_spread": "limit_range", "step_spread": "step_range"}
"""Names of SynthesisConfig's fields in version 0.1, and the new ones."""


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of a synthesis. Lengths are in pixels in [0, 1], or at the token sites in multiples of the standard
    deviation of the tokens (contrast 1; with contrast 0 in token units).

    Fields that are None get the recommended value of mode and site (RECOMMENDED) in __init__, so that
    `SynthesisConfig(mode="boundary", site="pixels")` is the recipe of docs/recipe.md.

    Attributes:
        mode: `universal`, `per_image`, `boundary`, or, for NullspaceAugment only, `free` (from the gradients of the
            training) and `random` (the start itself).
        site: `patch`, `block0` or `pixels`.
        count: universal: number M of noises in the bank.
        limit: the start is drawn from U(−limit, limit).
        limit_range: each start has its own limit, drawn from U((1 − limit_range)·limit, limit).
        smooth_limit: in pixels: a smooth field of up to this strength is added to each start, see
            fastnull.synthesis.starts.
        contrast: limits, step_size and lr are meant for images of this contrast (standard deviation of an image's
            values at the site) and are proportional to it, in pixels up to 1.5 times; universal noise takes the mean
            of the check images. At the token sites 1 makes the standard deviation of an image's tokens the unit of
            all lengths. 0: the lengths are absolute.
        eps: the largest influence allowed; in mode boundary the influence to reach, in mode free its mean.
        solver: universal: `gauss_newton` uses the change of every single image's probabilities, see
            fastnull.synthesis.gauss_newton; `adamw` follows the gradient of the mean distance between logits
            (published). None is adamw if one of its settings is given (lr, weight_decay, an objective other than l2),
            otherwise gauss_newton.
        radius: gauss_newton: longest step, as a fraction of the noise's norm.
        objective: `l2` or `l2_squared` distance between logits (adamw; in the other modes too), or (boundary)
            `prediction`: the cross entropy against the class predicted without noise.
        log_norm_weight: λ of the objective's −λ·log‖v‖ (paper, Eq. 6); 0 omits it.
        lr, weight_decay: of AdamW on the noise (universal, per_image); lr None is 0.1 at the token sites.
        steps: most updates of a noise; None is rounds × the batches of a round (universal) or 30 (per_image).
        rounds: universal: passes over the batches.
        image_fraction: universal: fraction of the batches that a round uses.
        schedule: of lr or radius. `cosine` decays over the steps that run; `published` has the published code's period,
            rounds × all batches, of which only image_fraction runs (so it barely decays); or `constant`.
        stop: universal: `check` stops when the influence on the check images is below ε, `batch` when that on the
            current minibatch is (published), `never` runs all steps.
        on_unmet: what happens to a noise that never met ε: `keep` reports it, `scale` bisects its scale to ε, `raise`.
        step_size: boundary, free: length of a step; at the token sites None is 0.1 × the mean norm of the start.
        step_range: boundary, free: each noise has its own step size, drawn from U((1 − range)·step_size, step_size).
        keep: universal: keep clean tokens and logits of the first round on the device for the later rounds, if half of
            a GPU's free memory can hold them (otherwise it warns). None keeps them for sequences, True for loaders too
            (whose later rounds then repeat the first), False never.
        warm: universal: fraction of `start`, or of the last bank in NullspaceAugment.refresh, in what a synthesis
            starts from; the rest is new. 0 starts from new noise, or from a `start` as it is.
        growing: universal: start with an eighth of each batch, and double it whenever all noises meet ε on theirs.
        final_scale: universal: at the end scale each noise, up or down, until its influence on the check images is just
            below ε.
        graph: run steps in a CUDA graph; None does so on the cuda backend. The host then learns 8 to 15 steps late that
            a noise met ε; with stop="check" the noise moves until then.
        dtype: of the encoder for the noise: `float32`, `bfloat16`, `float16`, or `auto`: a 16-bit dtype where this
            machine multiplies it faster (see FrozenEncoder) and ε is at least 0.01, otherwise the model's own.
        seed: of the start.
    """

    renamed = RENAMED

    mode: str = "universal"
    site: str = "patch"
    count: int = 1
    limit: float = _RECOMMENDED
    limit_range: float = 0.0
    smooth_limit: float = _RECOMMENDED
    contrast: float = _RECOMMENDED
    eps: float = _RECOMMENDED
    objective: str = _RECOMMENDED
    log_norm_weight: float = 0.0
    solver: str | None = None
    radius: float = 0.1
    lr: float | None = None
    weight_decay: float = 0.0
    steps: int | None = None
    rounds: int = 3
    image_fraction: float = 1.0
    schedule: str = "cosine"
    stop: str = "check"
    on_unmet: str = "keep"
    step_size: float | None = None
    step_range: float = _RECOMMENDED
    keep: bool | None = None
    warm: float = 0.0
    growing: bool = False
    final_scale: bool = False
    graph: bool | None = None
    dtype: str = "auto"
    seed: int = 0

    def __new__(cls, *_: Any, **given: Any) -> SynthesisConfig:
        refuse_renamed("SynthesisConfig", given, RENAMED)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, allowed in (("mode", ALL_MODES), ("site", SITES)):
            check_choice(name, as_type(name, getattr(self, name), str), allowed)
        if self.mode == "free" and self.site != "pixels":
            raise ValueError(f"mode 'free' is for site 'pixels'; got site={self.site!r}")
        self._resolve()
        check_fields(self)
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("schedule", SCHEDULES),
            ("stop", STOPS),
            ("on_unmet", ON_UNMET),
            ("dtype", DTYPES),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_number("eps", self.eps, 0, 2, exclusive=True)
        for name in ("limit", "smooth_limit"):
            # a limit in token units makes no sense in pixels
            check_number(name, getattr(self, name), 0, 1 if self.site == "pixels" else None)
        check_number("contrast", self.contrast, 0)
        if self.smooth_limit and self.site != "pixels":
            raise ValueError(f"smooth_limit is for site 'pixels'; got site={self.site!r}")
        if self.objective == PREDICTION and self.mode != "boundary":
            raise ValueError(f"objective {PREDICTION!r} is for mode 'boundary'; got mode={self.mode!r}")
        for name in ("limit_range", "step_range"):
            check_number(name, getattr(self, name), 0, 1)
        check_number("warm", self.warm, 0, 1)
        check_number("radius", self.radius, 0, exclusive=True)
        if self.lr is not None:
            check_number("lr", self.lr, 0, exclusive=True)
        check_number("image_fraction", self.image_fraction, 0, 1, exclusive=True)
        for name in ("weight_decay", "log_norm_weight"):
            check_number(name, getattr(self, name), 0)
        check_number("count", self.count, 1, MOST_NOISES)
        check_number("rounds", self.rounds, 1)
        if self.steps is not None:
            check_number("steps", self.steps, 1)
        if self.step_size is not None:
            check_number("step_size", self.step_size, 0, exclusive=True)
        if self.solver is not None:
            check_choice("solver", self.solver, SOLVERS)
        if self.solver == "gauss_newton" and self._asks_for_adamw:
            raise ValueError("lr, weight_decay and objective are settings of solver 'adamw'; 'gauss_newton' has radius")

    def _resolve(self) -> None:
        """Replace None by the recommended value for mode and site."""
        values = {**_OTHERWISE, **RECOMMENDED[self.mode, self.site == "pixels"]}
        if self.solver == "gauss_newton":
            values.pop("lr", None)
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def _asks_for_adamw(self) -> bool:
        return self.lr is not None or self.weight_decay > 0 or self.objective != "l2"

    @property
    def rule(self) -> str:
        """The solver in use: `gauss_newton` or `adamw`."""
        if self.mode != "universal":
            return "adamw"
        return self.solver or ("adamw" if self._asks_for_adamw else "gauss_newton")

    @property
    def rate(self) -> float:
        """Start of the schedule: lr of adamw, radius of gauss_newton."""
        return self.radius if self.rule == "gauss_newton" else self.lr or LR

    @property
    def encoder_dtype(self) -> torch.dtype | str | None:
        """`dtype` as FrozenEncoder takes it."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)  # type: ignore[no-any-return]
        return "auto" if self.eps >= LEAST_EPS_IN_16_BITS else None

    @classmethod
    def recommended(cls, augment: str, site: str | None = None, **changes: Any) -> SynthesisConfig:
        """The recommended settings of an augment, as used by NullspaceAugment and `finetune`.

        Args:
            augment: one of ALL_MODES.
            site: None takes `recommended_site(augment)`.
            changes: fields to change.
        """
        site = recommended_site(augment) if site is None else site
        return cls(mode=augment, site=site, **{**IN_TRAINING.get(augment, {}), **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SynthesisConfig:
        """From a mapping of fields; `preset` names the published constants to start from, see `published`.

        Raises:
            TypeError: an old name of a field, or a value of another type.
            ValueError: an unknown field, or a value that is not allowed.
        """
        refuse_renamed("SynthesisConfig", values, RENAMED)
        known = [*(entry.name for entry in fields(cls)), "preset"]
        for name in values:
            check_choice("field", name, known)
        changes = dict(values)
        preset = changes.pop("preset", None)
        return cls(**changes) if preset is None else cls.published(preset, **changes)

    @classmethod
    def published(cls, name: str = "finetune", **changes: Any) -> SynthesisConfig:
        """The published constants: limit, ε, AdamW's lr and default weight decay, rounds, stop rule, schedule.

        Args:
            name: `finetune` (the recipe behind the published tables: squared distance, ε 0.03), `first` (the first
                code release: distance, ε 0.01) or `single_gpu` (its small preset: limit 1, ε 0.001, lr 0.02).
            changes: fields to change.
        """
        common = cls(
            limit=3.0, contrast=0.0, lr=0.1, weight_decay=0.01, rounds=3, image_fraction=0.1, schedule="published",
            stop="batch",
        )  # fmt: skip
        presets = {
            "finetune": {"eps": 0.03, "objective": "l2_squared"},
            "first": {"eps": 0.01, "objective": "l2"},
            "single_gpu": {"eps": 0.001, "objective": "l2", "limit": 1.0, "lr": 0.02},
        }
        return replace(common, **{**presets[check_choice("preset", name, presets)], **changes})
