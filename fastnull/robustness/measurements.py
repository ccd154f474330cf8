"""The measurements of evaluate(): for each number, the function that gives its logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastnull.noise import Noise
from fastnull.robustness.attacks import apgd, autoattack, cw_l2, fgsm, mi_fgsm, patch_attack, pgd
from fastnull.robustness.attacks.base import model_logits
from fastnull.robustness.corruptions import corrupt
from fastnull.robustness.table import eps_name

BALL_ATTACKS = ("fgsm", "pgd", "mi_fgsm", "apgd", "apgd_t", "autoattack")
"""Suites with one number per radius."""
ATTACKS = (*BALL_ATTACKS, "cw", "patch")

# of the cw suite: the defaults of torchattacks, without a search for the constant
CW: dict[str, Any] = {"initial_const": 1.0, "search_steps": 1, "steps": 50, "lr": 0.01}

Response = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, labels, indices) → the model's logits [B, K] on the changed images."""


@dataclass(frozen=True)
class Measurement:
    """One number: its path in the results, the function for its logits, and the folder suite of its images, if any."""

    path: tuple[str, ...]
    respond: Response
    suite: str | None = None

    @property
    def name(self) -> str:
        return "/".join(self.path)


def plain(model: nn.Module) -> Response:
    """Logits of the unchanged images."""
    return lambda images, labels, indices: model_logits(model, images)


def clean_and_attacked(
    model: nn.Module, source: nn.Module, suites: Sequence[str], eps: Sequence[float], norm: str, steps: int,
    restarts: int, seed: int,
) -> list[Measurement]:  # fmt: skip
    """Clean accuracy, and attacks computed on `source` and tested on `model`, in the order in which they run."""

    def ball(suite: str, radius: float) -> Response:
        def attacked(images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            if suite == "fgsm":
                return fgsm(source, images, labels, radius, norm)
            if suite == "mi_fgsm":
                return mi_fgsm(source, images, labels, radius, steps=steps, norm=norm)
            if suite == "autoattack":
                return autoattack(source, images, labels, radius, norm=norm, seed=seed, batch_size=len(images))
            keyed: dict[str, Any] = {"steps": steps, "restarts": restarts, "seed": seed, "indices": indices}
            if suite == "pgd":
                return pgd(source, images, labels, radius, norm=norm, **keyed)
            loss = "dlr_targeted" if suite == "apgd_t" else "ce"
            return apgd(source, images, labels, radius, norm=norm, loss=loss, **keyed)

        return lambda images, labels, indices: model_logits(model, attacked(images, labels, indices))

    found = [Measurement(("clean",), plain(model))] if "clean" in suites else []
    for suite in BALL_ATTACKS:
        if suite in suites:
            found += [Measurement((suite, eps_name(radius, norm)), ball(suite, radius)) for radius in eps]
    if "cw" in suites:
        found.append(Measurement(("cw",), lambda x, labels, _: model_logits(model, cw_l2(source, x, labels, **CW))))
    if "patch" in suites:
        found.append(Measurement(("patch",), lambda x, labels, _: model_logits(model, patch_attack(source, x, labels))))
    return found


def noisy(model: nn.Module, noise: Noise) -> list[Measurement]:
    """The noise at its site, and its permutation."""
    from fastnull.encoder.frozen import FrozenEncoder
    from fastnull.synthesis.solvers import perturb

    encoder = FrozenEncoder(model, site=noise.site, backend="reference")

    def added(tokens: Tensor) -> Response:
        def respond(images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            inputs = encoder.embed(images)
            if inputs.shape[1:] != tokens.shape[1:]:
                raise ValueError(
                    f"the noise is of shape {list(tokens.shape[1:])}, but the model's {noise.site} is of shape "
                    f"{list(inputs.shape[1:])}"
                )
            rows = tokens[(indices % len(tokens)).to(tokens.device)].to(inputs.device)
            return encoder(perturb(encoder, inputs, rows)).float()

        return respond

    return [
        Measurement(("noise", "learned"), added(noise.tokens)),
        Measurement(("noise", "permuted"), added(noise.permuted().tokens)),
    ]


def corrupted(
    model: nn.Module, corruptions: Sequence[str], severities: Sequence[int], seed: int,
    frost_folder: str | os.PathLike[str] | None,
) -> list[Measurement]:  # fmt: skip
    """One number per corruption (computed in memory) and severity."""

    def respond(name: str, severity: int) -> Response:
        return lambda images, labels, indices: model_logits(
            model, corrupt(images, name, severity, seed=seed, indices=indices, frost_folder=frost_folder)
        )

    return [
        Measurement(("corruptions", name, str(int(severity))), respond(name, int(severity)))
        for name in corruptions
        for severity in severities
    ]
