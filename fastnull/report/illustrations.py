"""Figures of noise in a report: learned and permuted noise, its pre-image, and exact nullspace noise."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.noise import Noise
from fastnull.nullspace.patch import PatchNullspace
from fastnull.report.document import Figure
from fastnull.report.plots import exact_noise, influence_over_norm, token_noise
from fastnull.rng import generator
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.run import measure_influence, synthesize
from fastnull.tensor_files import write_tensors
from fastnull.vit import frozen

FILE = "noise.safetensors"
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
PERMUTATIONS = 3
PICTURES = 5
CONTRAST = 0.5
"""Pictures with exact noise have half contrast, so that noise up to 1/4 keeps them within [0, 1]."""


@dataclass(frozen=True)
class Illustrations:
    """Pictures and curves, saved in one file so that a report can be written again.

    Attributes:
        tensors: `tokens` [N, D] the learned noise; `pixels` [C, H, W] its pre-image; `picture` [C, H, W]; `clean`,
            `exact`, `random` [P, C, H, W] pictures without and with noise.
        facts: numbers and titles, as JSON values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        write_tensors(path, self.tensors, {"facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: Path) -> Illustrations:
        """Read a file of `save`. Raises ValueError for a damaged or other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                return cls({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118 (not a dict)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no illustrations of a report: {error}") from error

    def figures(self) -> list[Figure]:
        """The figures of a report's section on noise."""
        return [self._influence_figure(), self._token_figure(), *self._exact_figure()]

    def _influence_figure(self) -> Figure:
        facts = self.facts
        learned, permuted = facts["learned"], facts["permuted"]
        at_one = facts["factors"].index(1.0)
        ratio = permuted[at_one] / max(learned[at_one], 1e-12)
        met = "below" if learned[at_one] < facts["eps"] else "above"
        return influence_over_norm(
            {
                "learned": list(zip(facts["norms"], learned, strict=True)),
                f"permuted (mean of {PERMUTATIONS})": list(zip(facts["norms"], permuted, strict=True)),
            },
            facts["eps"],
            f"One noise for all images, learned on the pretrained model from a start in ±{facts['limit']:g}, then "
            f"scaled. Learning ended at an influence of {facts['check']:.3g} on held-out training images (ε is "
            f"{facts['eps']:g}). On {facts['images']} test images it is {learned[at_one]:.3g}, {met} ε; with the "
            f"elements shuffled, at the same norm, {permuted[at_one]:.3g} ({ratio:.1f} times as much). "
            "Influence: mean over images of the sum over classes of (p − p̃)².",
        )

    def _token_figure(self) -> Figure:
        tensors, facts = self.tensors, self.facts
        norms = torch.linalg.vector_norm(tensors["tokens"], dim=-1).view(facts["grid"])
        noisy = tensors["picture"] + tensors["pixels"]
        residual = facts["residual"]
        return token_noise(
            norms,
            tensors["picture"],
            tensors["pixels"],
            noisy,
            f"Norms of the learned noise between {norms.min():.2g} and {norms.max():.2g} on a {facts['grid'][0]} by "
            f"{facts['grid'][1]} grid of tokens, and the image noise that causes it",
            "The same learned noise as an image: the pixels of least norm whose tokens it is "
            f"(relative residual {residual:.1e}; `PatchNullspace.preimage`).",
        )

    def _exact_figure(self) -> list[Figure]:
        facts = self.facts
        if "exact" not in self.tensors:
            return []
        rows = {"picture": "clean", "+ nullspace noise": "exact", "+ random noise": "random"}
        moved = facts["moved"]
        return [
            exact_noise(
                {label: self.tensors[name] for label, name in rows.items()},
                {label: facts["titles"][name] for label, name in rows.items()},
                f"{len(self.tensors['exact'])} pictures, the same with exact nullspace noise and with random noise of "
                f"equal norm; predictions without noise {', '.join(facts['titles']['clean'])}, with nullspace noise "
                f"{', '.join(facts['titles']['exact'])}, with random noise {', '.join(facts['titles']['random'])}",
                f"Noise from the exact kernel of the patch embedding ({facts['dim']} of {facts['values']} dimensions "
                "per patch) at the largest size that keeps every pixel in [0, 1]: no probability moves by more than "
                f"{moved['exact']:.1e}. Random noise of the same norm below it moves them by up to "
                f"{moved['random']:.2g}. Above each picture: prediction and its probability.",
            )
        ]


def illustrate(
    model: nn.Module, train: Tensor, test: Tensor, config: SynthesisConfig, batch_size: int = 64
) -> Illustrations:
    """Learn a universal noise on `train` and illustrate it, and exact nullspace noise, on `test`.

    Args:
        model: a ViT that takes pixels in [0, 1].
        train, test: images [n, C, H, W].
        config: mode `universal`, site `patch`.
        batch_size: of the synthesis.
    """
    noise = synthesize(model, train.split(batch_size), config)
    shuffled = [noise.permuted(seed) for seed in range(PERMUTATIONS)]
    facts: dict[str, Any] = {
        "eps": config.eps,
        "limit": config.limit,
        "images": len(test),
        "check": float(noise.influence[0]),
        "factors": list(FACTORS),
        "norms": [factor * float(noise.norm[0]) for factor in FACTORS],
        "learned": _influences(model, [noise], test),
        "permuted": _influences(model, shuffled, test),
    }
    space = PatchNullspace.from_model(model)
    pixels, residual = space.preimage(noise.tokens[0].cpu())
    rows, columns = (size // patch for size, patch in zip(test.shape[2:], space.patch_size, strict=True))
    facts |= {"grid": [rows, columns], "residual": float(residual), "dim": space.dim, "values": space.dim + space.rank}
    tensors = {"tokens": noise.tokens[0].cpu(), "pixels": pixels, "picture": test[0]}
    if space.dim:
        tensors |= _exact(model, space, test[:PICTURES], facts)
    return Illustrations(tensors, facts)


def _influences(model: nn.Module, noises: Sequence[Noise], images: Tensor) -> list[float]:
    """Mean influence of the noises at each of FACTORS."""
    tokens = torch.cat([noise.tokens for noise in noises])  # [M, N, D]
    scaled = torch.cat([factor * tokens for factor in FACTORS])  # [F·M, N, D]
    zeros = torch.zeros(len(scaled))
    every = Noise(scaled, zeros, zeros, zeros.bool(), zeros.long(), site=noises[0].site)
    return measure_influence(model, every, images).view(len(FACTORS), -1).mean(1).tolist()


@torch.no_grad()
def _exact(model: nn.Module, space: PatchNullspace, pictures: Tensor, facts: dict[str, Any]) -> dict[str, Tensor]:
    """Pictures at half contrast, with nullspace noise and with random noise of the same norm, all within [0, 1]."""
    room = (1 - CONTRAST) / 2
    clean = room + CONTRAST * pictures
    source = generator(0)
    hidden = space.sample(clean, generator=source)
    hidden = hidden * (room / hidden.abs().amax((1, 2, 3), keepdim=True))
    visible = torch.randn(clean.shape, generator=source)
    length = [torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True) for noise in (hidden, visible)]
    shown = {"clean": clean, "exact": clean + hidden, "random": clean + visible * (length[0] / length[1])}
    with frozen(model):
        probabilities = {name: model(images).double().softmax(-1) for name, images in shown.items()}
    facts["titles"], facts["moved"] = {}, {}
    for name, values in probabilities.items():
        sure, classes = values.max(-1)
        facts["titles"][name] = [f"{c} ({100 * p:.1f} %)" for c, p in zip(classes.tolist(), sure.tolist(), strict=True)]
        facts["moved"][name] = float((values - probabilities["clean"]).abs().max())
    return shown
