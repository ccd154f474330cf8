"""Influence of noise, and agreement of predictions with and without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastnull.encoder.frozen import FrozenEncoder
from fastnull.rng import generator
from fastnull.synthesis.batches import Pair, embed_batch
from fastnull.synthesis.objective import influence
from fastnull.synthesis.solvers import norms, perturb

Row: TypeAlias = dict[str, Any]
"""A row of a table: names → numbers, strings or None."""


def embedded_pairs(encoder: FrozenEncoder, images: Tensor, batch_size: int) -> list[Pair]:
    """Clean tokens and logits of images [n, C, H, W], in batches."""
    return [embed_batch(encoder, batch) for batch in images.split(batch_size)]


@torch.no_grad()
def measure(
    encoder: FrozenEncoder, noises: Tensor, pairs: Iterable[Pair], *, shared: bool = True
) -> tuple[float, float]:
    """Influence and agreement (fraction of unchanged predictions) of noises [M, ...], over noises and images.

    Each noise is measured on all images, or without `shared` noise i only on image i.
    """
    influences: list[Tensor] = []
    same: list[Tensor] = []
    begin = 0
    for tokens, clean in pairs:
        end = begin + len(clean)
        for noise in noises if shared else (noises[begin:end],):
            noisy = encoder(perturb(encoder, tokens, noise.to(encoder.device)))
            influences.append(influence(clean, noisy))
            same.append(clean.argmax(1) == noisy.argmax(1))
        begin = end
    return float(torch.cat(influences).mean()), float(torch.cat(same).float().mean())


def controls(noise: Tensor, count: int, seed: int = 0) -> dict[str, Tensor]:
    """`count` noises [count, ...] with the norm of `noise` of each kind: `permuted` elements, or `random` Gaussian."""
    source = generator(seed)
    flat = noise.detach().cpu().flatten()
    permuted = torch.stack([flat[torch.randperm(len(flat), generator=source)] for _ in range(count)])
    random = torch.randn(permuted.shape, generator=source, dtype=flat.dtype)
    random = random * (torch.linalg.vector_norm(flat) / norms(random))[:, None]
    return {name: rows.view(count, *noise.shape) for name, rows in (("permuted", permuted), ("random", random))}


def measured_row(encoder: FrozenEncoder, noises: Tensor, pairs: Sequence[Pair], about: Mapping[str, Any]) -> Row:
    """`about` with norm, influence and agreement of the noises [M, ...]."""
    found, same = measure(encoder, noises, pairs)
    return {**about, "norm": float(norms(noises).mean()), "influence": found, "agreement": same}
