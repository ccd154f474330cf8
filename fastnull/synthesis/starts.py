"""The start of a noise and the length of its steps: the random numbers of a synthesis.

A start is uniform noise. Each image can have its own strength and a smooth field on top. Steps have one length, or one
per image. Both can be proportional to the contrast of the image.

The uniform start is the published one; the rest is ours. With strengths up to the limit, the training also covers what
lies near an image. A smooth field (white noise on a coarse grid, interpolated to the size of the image) has the low
frequencies of blur, fog and changes of brightness and contrast, which uniform noise lacks; the idea is that of training
on noise with the spectrum of natural images. Noise of one length for all images hides a pale image (sky, fog), which
the model then learns to ignore, and hardly changes one of high contrast. Noise proportional to contrast avoids both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnull.checks import check_finite, check_number
from fastnull.rng import KeyedRandom
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.solvers import TENTH, expand_as_noise, first_step_size, norms

GRIDS = 4
"""How many grids smooth fields are drawn on: of 1, 2, 4 and 8 cells a side. Each image gets one of them."""
MOST_CELLS = 2 ** (GRIDS - 1)

MOST_CONTRAST = 1.5
"""Noise grows with contrast up to this multiple of the contrast that its lengths are for."""


class Start(NamedTuple):
    """What the synthesis of one noise per image starts from."""

    noise: Tensor
    """[B, ...]"""
    step_size: float | Tensor
    """Length of a boundary step, or the highest learning rate: one for all (a number or []), or one per image [B]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The noise, and the step size where it is a tensor: what changes from batch to batch."""
        return (self.noise, self.step_size) if isinstance(self.step_size, Tensor) else (self.noise,)


def step_source(seed: int, step: int, rows: Tensor) -> KeyedRandom:
    """The random numbers of a training step for the images at these rows [B] of its batch, on the device of `rows`."""
    return KeyedRandom(seed, f"start/{step}", rows)


def draw_start(tokens: Tensor, config: SynthesisConfig, source: KeyedRandom, *, given: Tensor | None = None) -> Start:
    """The noise that synthesis starts from and its step sizes, both proportional to the contrast with config.contrast.

    The host draws nothing and does not wait for a device.

    Args:
        tokens: at the site, without noise [B, ...].
        config: limits, ranges, contrast, step_size and lr are used.
        source: of the random numbers, on the device of the tokens. An image gets the same numbers in every batch.
        given: noise [B, ...] to start from in place of a drawn one; it is not scaled.

    Raises:
        ValueError, TypeError: `given` of another shape or dtype, or limits beyond float32.
    """
    noise = (
        start_noise(tokens.shape[1:], config, source, tokens.dtype)
        if given is None
        else checked_start(given, tokens.shape, tokens)
    )
    by_norm = given is not None and config.mode == "boundary" and config.step_size is None
    size: float | Tensor = TENTH * norms(noise).mean() if by_norm else first_step_size(tokens.shape[1:], config)
    if config.step_range and config.mode != "per_image":
        size = size * (1 - config.step_range * source.uniform().to(noise.dtype))
    if not config.contrast:
        return Start(noise, size)
    factor = relative_contrast(tokens, config).to(noise.dtype)
    return Start(noise * expand_as_noise(factor, noise) if given is None else noise, size if by_norm else size * factor)


def start_noise(shape: Sequence[int], config: SynthesisConfig, source: KeyedRandom, dtype: torch.dtype) -> Tensor:
    """Noise to start synthesis from, [B, ...]; the same on every device.

    Args:
        shape: of one noise; [C, H, W] in pixels.
        config: limit, limit_range and smooth_limit are used.
        source: of the random numbers of B noises; they come on its device.
        dtype: of the tokens. The result is float64 where it is, else float32: noise is optimised in at least that.

    Raises:
        ValueError: limits beyond float32.
    """
    most = torch.finfo(torch.float32).max
    check_number("limit", config.limit, 0, most)
    check_number("limit + smooth_limit", config.limit + config.smooth_limit, 0, most)
    each = [1] * len(shape)
    noise = source.symmetric(*shape, limit=config.limit)
    if config.limit_range:
        noise *= 1 - config.limit_range * source.uniform(*each)
    if config.smooth_limit:
        noise += config.smooth_limit * source.uniform(*each) * _smooth(shape, source)
    return noise.to(torch.float64 if dtype == torch.float64 else torch.float32)


def relative_contrast(tokens: Tensor, config: SynthesisConfig) -> Tensor:
    """Standard deviation of the values of each image at the site [B, ...] over config.contrast, [B] in at least
    float32; in pixels at most MOST_CONTRAST."""
    wide = tokens.flatten(1).to(torch.promote_types(tokens.dtype, torch.float32))
    factor = wide.std(1) / config.contrast
    return factor.clamp(max=MOST_CONTRAST) if config.site == "pixels" else factor


def at_mean_contrast(
    config: SynthesisConfig, batches: Sequence[Tensor], mean: Callable[[Tensor], Tensor] | None
) -> SynthesisConfig:
    """Settings of a universal synthesis with limits and lr for the mean contrast of images.

    Args:
        config: with `contrast`; without it the result is the same.
        batches: of images at the site [B, ...], without noise.
        mean: takes the mean over processes that hold other images; None is one process.

    Raises:
        ValueError: the images have no contrast.
    """
    if not config.contrast:
        return config
    contrast = torch.cat([relative_contrast(tokens, config) for tokens in batches])
    sums = torch.stack([contrast.sum(), contrast.new_tensor(len(contrast))])
    total, count = (sums if mean is None else mean(sums)).tolist()  # processes may hold different numbers of images
    factor = total / count
    if factor == 0:
        raise ValueError(
            f"the check images have no contrast at site {config.site!r}, and lengths are proportional to it: use "
            "images that are not constant, or contrast=0"
        )
    changes: dict[str, Any] = {} if config.rule == "gauss_newton" else {"lr": factor * config.rate}
    for name in ("limit", "smooth_limit"):
        scaled = factor * getattr(config, name)
        changes[name] = min(scaled, 1.0) if config.site == "pixels" else scaled
    return replace(config, contrast=0.0, **changes)


def _smooth(shape: Sequence[int], source: KeyedRandom) -> Tensor:
    """A field for each image [B, 1, H, W]: U(−1, 1) in every cell of a grid, interpolated bilinearly. It has no colour:
    fields that had one cost much accuracy on photographs."""
    _, H, W = shape
    cells = 2 ** source.integers(GRIDS)  # [B], of a side
    coarse = source.symmetric(MOST_CELLS, MOST_CELLS)  # of which a grid of fewer cells takes a corner
    columns = _drawn_out(coarse, cells, W).transpose(1, 2).contiguous()  # [B, MOST_CELLS, W]
    return _drawn_out(columns, cells, H).unsqueeze(1)


def _drawn_out(values: Tensor, cells: Tensor, size: int) -> Tensor:
    """The first cells [B] of each image's values [B, MOST_CELLS, X] → [B, size, X], as F.interpolate does. Sorting the
    images by their number of cells would need the host to wait for a device."""
    last = (cells - 1).unsqueeze(1)
    middle = torch.arange(size, device=cells.device, dtype=torch.float32) + 0.5
    position = (middle * (cells.unsqueeze(1) / size) - 0.5).clamp(min=0)  # [B, size]
    low = position.to(torch.int64).minimum(last)
    first = MOST_CELLS * torch.arange(len(cells), device=cells.device).unsqueeze(1)
    rows = values.flatten(0, 1)
    below, above = (
        rows.index_select(0, (first + index).flatten()).view(len(cells), size, -1)
        for index in (low, (low + 1).minimum(last))
    )
    return above.sub_(below).mul_((position - low).unsqueeze(2)).add_(below)


def bank_start(shape: Sequence[int], config: SynthesisConfig, like: Tensor) -> Tensor:
    """The noises [M, ...] of `shape` that a bank starts from; the first ones do not depend on how many there are."""
    source = KeyedRandom(config.seed, "bank", torch.arange(shape[0], device=like.device))
    return start_noise(shape[1:], config, source, like.dtype)


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
    fresh = bank_start(last.shape, config, last)
    length = expand_as_noise(norms(fresh), fresh)
    old = last * (length / expand_as_noise(norms(last), last).clamp_min(1e-30))
    mixed = config.warm * old + (1 - config.warm) * fresh
    return mixed * (length / expand_as_noise(norms(mixed), mixed).clamp_min(1e-30))
