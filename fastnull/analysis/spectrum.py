"""Singular values of the encoder's Jacobian with respect to token noise.

To first order noise v, shared by all images, changes their outputs by J_i v, and E‖J_i v‖² = vᵀ (E J_iᵀ J_i) v. The
singular values of A = [J_1; …; J_n] / √n are therefore the root mean square changes of the output along orthogonal
directions of noise. Directions with small values are the approximate nullspace near v = 0. A is not stored: a
randomised range finder with power iterations (Halko, Martinsson and Tropp 2011) uses products with A (JVP) and its
transpose (VJP).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastnull.analysis.measure import Row, embedded_pairs, measured_row
from fastnull.checks import check_choice, check_number
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.rng import generator
from fastnull.vit import SITES, frozen
from fastnull.vit.base import SplitViT
from fastnull.vit.layers import blocks_of
from fastnull.vit.split import as_split

LOGITS = "logits"
OVERSAMPLE = 8
ITERATIONS = 2
PROBES = 16
"""Random directions that measure the remaining singular values."""
MOST_IMAGES = 1024
"""Maximum of images times directions in one pass."""

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """The largest singular values of A at one depth.

    Attributes:
        depth: number of blocks before it, or `logits`.
        values: [k], descending: root mean square change of the output for noise of norm 1 along each direction.
        directions: [k, n], orthonormal, n the number of elements of the noise.
        rest: estimated root mean square of the other n − k singular values; 0 if there are none.
        output: root mean square over images of ‖output‖ without noise.
    """

    depth: int | str
    values: Tensor
    directions: Tensor
    rest: float
    output: float


def randomized_svd(
    forward: Product,
    adjoint: Product,
    size: int,
    rank: int,
    source: torch.Generator,
    *,
    like: Tensor,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """The largest singular values and right singular vectors of a matrix A [m, n], from products with it.

    Args:
        forward: V [k, n] → V Aᵀ [k, m].
        adjoint: U [k, m] → U A [k, n].
        size: n.
        rank: number of values; n gives all of them, exactly.
        source: of the random start.
        like: gives dtype and device.
        iterations: power iterations, for spectra that fall slowly.

    Returns:
        values [rank] and directions [rank, n]; fewer if A has fewer rows.
    """
    start = min(size, rank + OVERSAMPLE)
    drawn = torch.randn(start, size, generator=source, dtype=torch.float64).to(like)
    basis = _orthonormal(forward(drawn))  # [k, m]
    for _ in range(iterations):
        basis = _orthonormal(forward(_orthonormal(adjoint(basis))))
    _, values, directions = torch.linalg.svd(adjoint(basis), full_matrices=False)
    return values[:rank], directions[:rank]


def jacobian_spectra(
    model: nn.Module | SplitViT,
    images: Tensor,
    rank: int = 64,
    *,
    site: str = "patch",
    depths: list[int | str] | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> list[Spectrum]:
    """Spectra of the Jacobian from noise at the site to the tokens after each block, and to the logits.

    Args:
        model: a ViT, or an adapter; runs in eval mode in its own dtype, without weight gradients.
        images: [n, C, H, W]; all are kept in memory.
        rank: number of singular values; at most the number of elements of the noise.
        site: patch, block0 or pixels.
        depths: numbers of blocks, and `logits`; default: every block and the logits.
        iterations: power iterations.
        seed: of the random start.

    Raises:
        ValueError: rank < 1, an unknown site or depth, or unknown blocks.
    """
    check_number("rank", rank, 1)
    vit = as_split(model, check_choice("site", site, SITES))
    blocks = blocks_of(vit.network, least=1)
    allowed: list[int | str] = [*range(1, len(blocks) + 1), LOGITS]
    for depth in depths or ():
        if depth not in allowed:
            raise ValueError(f"depths must be block numbers 1 to {len(blocks)} or {LOGITS!r}; got {depth!r}")
    with frozen(vit.model), sdpa_kernel(SDPBackend.MATH):  # the fused kernels lack forward-mode AD
        with torch.no_grad():
            clean = vit.embed(images, site)
        return [
            _spectrum(_behind(vit, blocks, clean, site, depth), clean, depth, rank, iterations, seed)
            for depth in (allowed if depths is None else depths)
        ]


def spectrum_rows(spectra: list[Spectrum]) -> list[Row]:
    """Rows with depth, index (from 1), value and relative (to the output's norm); the row of `rest` has index None."""
    rows: list[Row] = []
    for found in spectra:
        pairs = [(index + 1, value) for index, value in enumerate(found.values.tolist())]
        rows += [
            {"depth": found.depth, "index": index, "value": value, "relative": value / found.output}
            for index, value in [*pairs, (None, found.rest)]
        ]
    return rows


def along(
    encoder: FrozenEncoder,
    spectrum: Spectrum,
    images: Tensor,
    norms: list[float],
    *,
    batch_size: int = 64,
    seed: int = 0,
    count: int = 3,
) -> list[Row]:
    """Measured influence of noise along, random to, and outside the directions of a spectrum, over its norm.

    Returns:
        Rows with kind (`strongest`: the first direction; `random`; `outside`: random, without the directions found),
        norm, influence, agreement and predicted (rms change of the output by the Jacobian; None for `random`).
    """
    pairs = embedded_pairs(encoder, images, batch_size)
    shape = pairs[0][0].shape[1:]
    directions = spectrum.directions.to("cpu", torch.float64)
    random = torch.randn(count, directions.shape[1], generator=generator(seed), dtype=torch.float64)
    outside = random - (random @ directions.T) @ directions
    kinds: dict[str, Tensor] = {"strongest": directions[:1], "random": random}
    if len(directions) < directions.shape[1]:
        kinds["outside"] = outside
    slopes = {"strongest": float(spectrum.values[0]), "outside": spectrum.rest}
    rows = []
    for kind, flat in kinds.items():
        unit = (flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)).float().view(-1, *shape)
        for norm in norms:
            row = measured_row(encoder, norm * unit, pairs, {"kind": kind})
            rows.append({**row, "predicted": norm * slopes[kind] if kind in slopes else None})
    return rows


def _behind(
    vit: SplitViT, blocks: list[nn.Module], clean: Tensor, site: str, depth: int | str
) -> Callable[[Tensor], Tensor]:
    """A function: noise [...] shared by all images → output after `depth` [B, ...]."""

    def run(noise: Tensor) -> Tensor:
        if depth == LOGITS:
            return vit.logits(clean + noise, site)
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        handle = blocks[int(depth) - 1].register_forward_hook(catch)
        try:
            vit.logits(clean + noise, site)
        finally:
            handle.remove()
        return caught[-1]

    return run


def _spectrum(
    run: Callable[[Tensor], Tensor], clean: Tensor, depth: int | str, rank: int, iterations: int, seed: int
) -> Spectrum:
    images, shape = len(clean), clean.shape[1:]
    size, chunk = shape.numel(), max(1, MOST_IMAGES // images)
    zero = clean.new_zeros(shape)
    output, pull = torch.func.vjp(run, zero)

    def push(tangent: Tensor) -> Tensor:
        return torch.func.jvp(run, (zero,), (tangent,))[1]

    def forward(rows: Tensor) -> Tensor:
        return torch.func.vmap(push, chunk_size=chunk)(rows.view(-1, *shape)).flatten(1) / math.sqrt(images)

    def adjoint(rows: Tensor) -> Tensor:
        cotangents = rows.view(-1, *output.shape)
        return torch.func.vmap(lambda row: pull(row)[0], chunk_size=chunk)(cotangents).flatten(1) / math.sqrt(images)

    source = generator(seed)
    values, directions = randomized_svd(forward, adjoint, size, rank, source, like=zero, iterations=iterations)
    rest = 0.0
    if len(directions) < size:
        probes = torch.randn(PROBES, size, generator=source, dtype=torch.float64).to(zero)
        probes = probes - (probes @ directions.T) @ directions
        # the mean square for Gaussian probes is the sum of the remaining squares
        rest = math.sqrt(float(forward(probes).square().sum(1).mean()) / (size - len(directions)))
    scale = float(output.detach().flatten(1).square().sum(1).mean().sqrt())
    return Spectrum(depth, values.detach(), directions.detach(), rest, scale)


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows [k, m]; at most m rows."""
    return torch.linalg.qr(rows.T)[0].T
