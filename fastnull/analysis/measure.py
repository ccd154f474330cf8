"""What every analysis asks of noise: its influence, and how many predictions it leaves as they were."""

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
"""A line of a table: names → numbers, words or None."""


def embedded_pairs(encoder: FrozenEncoder, images: Tensor, batch_size: int) -> list[Pair]:
    """Images [n, C, H, W] as clean tokens and logits, batch by batch."""
    return [embed_batch(encoder, batch) for batch in images.split(batch_size)]


@torch.no_grad()
def measure(
    encoder: FrozenEncoder, noises: Tensor, pairs: Iterable[Pair], *, shared: bool = True
) -> tuple[float, float]:
    """Influence and agreement of noises, as a mean over noises and images.

    Args:
        encoder: at the site of the noise.
        noises: [M, ...].
        pairs: clean tokens and logits, see `embedded_pairs`.
        shared: each noise is measured on all images; False: noise i on image i alone.

    Returns:
        The influence, and the fraction of images whose prediction stays.
    """
    seen: list[Tensor] = []
    same: list[Tensor] = []
    begin = 0
    for tokens, clean in pairs:
        end = begin + len(clean)
        for noise in noises if shared else (noises[begin:end],):
            noisy = encoder(perturb(encoder, tokens, noise.to(encoder.device)))
            seen.append(influence(clean, noisy))
            same.append(clean.argmax(1) == noisy.argmax(1))
        begin = end
    return float(torch.cat(seen).mean()), float(torch.cat(same).float().mean())


def controls(noise: Tensor, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Noises of the norm of `noise` [...] without its direction, `count` [count, ...] of each kind.

    `permuted` has its elements in another order, `random` is Gaussian.
    """
    source = generator(seed)
    flat = noise.detach().cpu().flatten()
    permuted = torch.stack([flat[torch.randperm(len(flat), generator=source)] for _ in range(count)])
    random = torch.randn(permuted.shape, generator=source, dtype=flat.dtype)
    random = random * (torch.linalg.vector_norm(flat) / norms(random))[:, None]
    return {name: rows.view(count, *noise.shape) for name, rows in (("permuted", permuted), ("random", random))}


def measured_row(encoder: FrozenEncoder, noises: Tensor, pairs: Sequence[Pair], about: Mapping[str, Any]) -> Row:
    """A row: what `about` says, then norm, influence and agreement of the noises [M, ...]."""
    seen, same = measure(encoder, noises, pairs)
    return {**about, "norm": float(norms(noises).mean()), "influence": seen, "agreement": same}
