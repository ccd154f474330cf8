"""EvaluationSettings: what evaluate() measures and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastnull.checks import check_choice, check_fields, check_number
from fastnull.robustness.attacks.base import NORMS
from fastnull.robustness.corruptions import CORRUPTIONS, DEMO_CORRUPTIONS, SEVERITIES
from fastnull.robustness.suites import FOLDER_SUITES, suite_parts

BALL_ATTACKS = ("fgsm", "pgd", "mi_fgsm", "apgd", "apgd_t", "autoattack")
"""Suites with one number per radius."""
ATTACKS = (*BALL_ATTACKS, "cw", "patch")
SUITES = ("clean", *ATTACKS, "noise", "corruptions", *FOLDER_SUITES)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, on how many images, and where the result goes.

    Attributes:
        suites: any of `clean`; `fgsm`, `pgd`, `mi_fgsm`, `apgd` (cross entropy), `apgd_t` (targeted DLR) and
            `autoattack`, at each radius of `eps`; `cw` (L2, constant 1) and `patch` (one patch), which have no radius;
            `noise`; `corruptions` in memory; and the folders under `root`, see fastnull.robustness.suites.
        eps: radii of the attacks, in units of pixels in [0, 1]; results are keyed "8/255" (`linf`) or "0.5" (`l2`).
        norm: `linf` or `l2`.
        steps: of PGD, MI-FGSM and APGD; PGD's step size is eps / 4, its start random.
        restarts: of PGD and APGD.
        final_iterate: attack every image, misclassified ones too, with all steps and by autograd, and judge PGD and
            MI-FGSM by the last point, as other libraries do; False: an image is robust if the model is right about
            it and about every point that was tried, and is attacked until it is not. Attacks of another model
            (`source`) always go to the last point.
        corruptions: names of fastnull.robustness.CORRUPTIONS, computed in memory.
        corruption_size: height and width in pixels in which image files are corrupted in memory, before they are
            resized for the model; 32 has CIFAR-10-C's constants, any other size ImageNet-C's. None: the model's size.
        severities: any of 1 .. 5, of corruptions in memory, imagenet-c and cifar10-c.
        root: folder of the published test sets.
        frost_folder: folder of pictures for the corruption frost; None: those that the package generates.
        skip_bad: skip and list unreadable image files of `root`; False: raise an error.
        batch_size: for tensors and data sets; a DataLoader has its own.
        workers: processes that load a data set.
        seed: of the random starts and corruptions.
        device: where to run; the model is moved there. None: the device of the model.
        out: JSON file for the result, written after every number and every 30 seconds.
        resume: continue from the results in `out`; False: start again.
        progress: show a progress bar.
        limit: number of images to use of each data set, drawn evenly over its classes by the seed: the same ones
            for every model.

    Raises:
        TypeError: a field of another type.
        ValueError: a value that is not allowed.
    """

    suites: tuple[str, ...] = ("clean", "fgsm", "pgd", "corruptions")
    eps: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
    norm: str = "linf"
    steps: int = 10
    restarts: int = 1
    final_iterate: bool = False
    corruptions: tuple[str, ...] = DEMO_CORRUPTIONS
    corruption_size: int | None = None
    severities: tuple[int, ...] = SEVERITIES
    root: str | None = None
    frost_folder: str | None = None
    skip_bad: bool = False
    batch_size: int = 256
    workers: int = 0
    seed: int = 0
    device: torch.device | str | int | None = None
    out: str | None = None
    resume: bool = True
    progress: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("suites", "corruptions"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise TypeError(f"{name} must be a sequence of names; got the string {values!r}")
        check_fields(self)
        if not self.suites:
            raise ValueError(f"suites must name at least one of {', '.join(SUITES)}")
        for suite in self.suites:
            check_choice("suite", suite, SUITES)
        check_choice("norm", self.norm, NORMS)
        for radius in self.eps:
            check_number("eps", radius, 0, 1 if self.norm == "linf" else None)
        for corruption in self.corruptions:
            check_choice("corruption", corruption, CORRUPTIONS)
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise ValueError(f"severities must be among 1, 2, 3, 4, 5; got {severity!r}")
        for name in ("steps", "restarts", "batch_size"):
            check_number(name, getattr(self, name), 1)
        check_number("workers", self.workers, 0)
        if self.corruption_size is not None:
            check_number("corruption_size", self.corruption_size, 16)
        if self.limit is not None:
            check_number("limit", self.limit, 1)

    @property
    def folders(self) -> list[str]:
        """The parts of the suites that are folders under `root`."""
        return [part for suite in self.suites if suite in FOLDER_SUITES for part in suite_parts(suite, self.severities)]

    @property
    def on_data(self) -> bool:
        """Whether any suite uses the `data` of evaluate()."""
        return bool(set(self.suites) - set(FOLDER_SUITES))
