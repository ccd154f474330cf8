"""What noise starts from, and how far its steps go: the random numbers of a synthesis.

A start is uniform numbers, or such with a strength of its own for each image, or with a smooth field on it. Steps are
of one length, or each image has its own. Both can be in proportion to the image's contrast.

The uniform start is the published one; all else is ours. An image that is given noise of any strength up to the
limit, and not of one length only, is trained on what lies near it too. A smooth field (white noise on a coarse grid,
drawn out to the image's size) has the low frequencies that blurs, fog, and changes of brightness and contrast have, and
that no uniform start has; it is in the spirit of training on noise with the spectrum of natural images. Noise in
proportion to contrast asks as much of every image: of one length for all, it drowns a pale image (sky, fog), which the
model then learns to overlook, and hardly moves a stark one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnull.checks import check_finite, check_number
from fastnull.rng import Place, carried, generator, uniform
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.solvers import boundary_step_size, expand_as_noise, norms

GRIDS = (1, 2, 4, 8)
"""Cells across an image of the grids that smooth fields are drawn on; each image gets one of them."""


MOST_CONTRAST = 1.5
"""Times the contrast that noise is meant for: that of a starker image counts no more."""


class Start(NamedTuple):
    """What the synthesis of one noise per image starts from."""

    noise: Tensor
    """[B, ...]"""
    step_size: float | Tensor
    """Length of a boundary step: one for all (a number or []), or one for each image [B]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The noise, and the step size where it is a tensor: what changes from batch to batch."""
        return (self.noise, self.step_size) if isinstance(self.step_size, Tensor) else (self.noise,)


def draw_start(
    tokens: Tensor,
    config: SynthesisConfig,
    source: torch.Generator,
    step_source: torch.Generator | None = None,
    *,
    place: Place | None = None,
    one_by_one: bool = False,
    given: Tensor | None = None,
) -> Start:
    """The noise that synthesis starts from and its step sizes, both for the contrast of the images.

    Args:
        tokens: at the site, without noise [B, ...].
        config: limits, ranges, contrast and step_size are used.
        source: of the random numbers.
        step_source: of those of the step sizes; None: `source`, after the noise.
        place: where the images lie in a larger batch; they get what they would get in it. None: they are the batch.
        one_by_one: draw the noise image by image: then it does not depend on how many images follow.
        given: noise [B, ...] to start from in place of a drawn one; it is not scaled to the contrast.

    Raises:
        ValueError, TypeError: `given` of another shape or dtype, or limits beyond float32.
    """
    if given is not None:
        noise = checked_start(given, tokens.shape, tokens)
    elif place is not None:
        # on the CPU, where it is drawn: only this part of it travels
        host = tokens.new_empty(0, device="cpu")
        noise = start_noise((place.total, *tokens.shape[1:]), config, source, host)
    elif one_by_one:
        noise = noise_one_by_one(tokens.shape, config, source, tokens)
    else:
        noise = start_noise(tokens.shape, config, source, tokens)
    size = step_sizes(noise, config, step_source or source)
    if given is not None:
        return Start(noise, size)
    if place is not None:
        noise = carried(noise[place.rows], tokens.device)
        if isinstance(size, Tensor):
            size = carried(size[place.rows] if size.ndim else size, tokens.device)
    return Start(*scale_to_contrast(tokens, noise, size, config))


def start_noise(shape: Sequence[int], config: SynthesisConfig, source: torch.Generator, like: Tensor) -> Tensor:
    """Noise to start synthesis from, [B, ...]; drawn on the CPU, so that every device gets the same.

    Args:
        shape: of the result; [B, C, H, W] in pixels.
        config: limit, limit_range and smooth_limit are used.
        source: of the random numbers.
        like: a tensor whose device, and float64 if it has it, the result takes; else it is float32.

    Raises:
        ValueError: limits beyond float32.
    """
    most = torch.finfo(torch.float32).max
    check_number("limit", config.limit, 0, most)
    check_number("limit + smooth_limit", config.limit + config.smooth_limit, 0, most)
    noise = uniform(shape, config.limit, source, like)
    if config.limit_range:
        noise *= 1 - config.limit_range * _strengths(noise, source)
    if config.smooth_limit:
        noise += config.smooth_limit * _strengths(noise, source) * _smooth(noise, source)
    return noise


def scale_to_contrast(
    images: Tensor, start: Tensor, size: float | Tensor, config: SynthesisConfig
) -> tuple[Tensor, float | Tensor]:
    """A start [B, ...] and step sizes for the contrast of the images [B, ...], the standard deviation of an image's
    values: both times contrast / config.contrast, but at most MOST_CONTRAST. With config.contrast 0 as they are.
    """
    if not config.contrast:
        return start, size
    factor = (images.flatten(1).std(1) / config.contrast).clamp(max=MOST_CONTRAST).to(start.dtype)  # [B]
    return start * expand_as_noise(factor, start), size * factor


def step_sizes(start: Tensor, config: SynthesisConfig, source: torch.Generator) -> float | Tensor:
    """Length of a boundary step from a start [B, ...]: one for all (a number or []), or with step_range [B]."""
    size = boundary_step_size(start, config)
    if config.step_range:
        return size * (1 - config.step_range * _strengths(start, source).flatten())
    return size


def _strengths(noise: Tensor, source: torch.Generator) -> Tensor:
    """U(0, 1) for each image, [B, 1, ...]."""
    drawn = torch.rand((len(noise), *[1] * (noise.ndim - 1)), generator=source, dtype=torch.float32)
    return carried(drawn, noise.device).to(noise.dtype)


def _smooth(noise: Tensor, source: torch.Generator) -> Tensor:
    """A field for each image [B, 1, H, W]: U(−1, 1) in every cell of a grid, interpolated bilinearly. It has no colour:
    fields that had one cost much accuracy on photographs."""
    B, _, H, W = noise.shape
    field = torch.empty(B, 1, H, W, dtype=torch.float32)
    grids = torch.randint(len(GRIDS), (B,), generator=source)
    for index, cells in enumerate(GRIDS):
        rows = (grids == index).nonzero().flatten()
        if len(rows):
            coarse = 2 * torch.rand((len(rows), 1, cells, cells), generator=source, dtype=torch.float32) - 1
            field[rows] = F.interpolate(coarse, size=(H, W), mode="bilinear", align_corners=False)
    return carried(field, noise.device).to(noise.dtype)


def noise_one_by_one(shape: Sequence[int], config: SynthesisConfig, source: torch.Generator, like: Tensor) -> Tensor:
    """`start_noise`, drawn one after the other: the first ones do not depend on how many there are."""
    return torch.cat([start_noise((1, *shape[1:]), config, source, like) for _ in range(shape[0])])


def checked_start(given: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """A copy of a caller's start, checked, in the dtype in which noise is optimised and on the device of `like`."""
    if tuple(given.shape) != tuple(shape):
        raise ValueError(f"start must have shape {list(shape)}; got {list(given.shape)}")
    if not given.is_floating_point():
        raise TypeError(f"start must be of a floating dtype; got {given.dtype}")
    check_finite("start", given)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return given.detach().to(like.device, dtype, copy=True, memory_format=torch.contiguous_format)


def warm_start(config: SynthesisConfig, last: Tensor) -> Tensor:
    """What `synthesize` draws for config.seed, mixed with the last bank [M, ...]; each noise as long as the fresh one.

    Directions are mixed, a fraction config.warm of the last: noise that has shrunk in its synthesis counts as much.
    """
    fresh = noise_one_by_one(last.shape, config, generator(config.seed, 0), last)
    length = expand_as_noise(norms(fresh), fresh)
    old = last * (length / expand_as_noise(norms(last), last).clamp_min(1e-30))
    mixed = config.warm * old + (1 - config.warm) * fresh
    return mixed * (length / expand_as_noise(norms(mixed), mixed).clamp_min(1e-30))
