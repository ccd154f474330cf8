"""`synthesize`: universal noise or noise for each image, by a SynthesisConfig."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import is_out_of_memory
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.noise import Noise
from fastnull.ops.common import no_autocast
from fastnull.progress import progress_bar
from fastnull.rng import KeyedRandom, preserved
from fastnull.synthesis.batches import Batches, as_batches, count_images, embed_batch, one_size
from fastnull.synthesis.config import ALL_MODES, MODES, SynthesisConfig
from fastnull.synthesis.objective import influence
from fastnull.synthesis.solvers import expand_as_noise, norms, perturb, replayed_noise
from fastnull.synthesis.starts import at_mean_contrast, bank_start, checked_start, draw_start, warm_start
from fastnull.synthesis.universal import Mean, UniversalRun, judge, scaled_to_eps
from fastnull.vit.base import SplitViT

BANK_COPIES = 6
"""Tensors of the bank's size that a universal run holds at once: noise, change, moments, and those of a step."""
BISECTIONS = 20


class EpsilonNotMetError(RuntimeError):
    """A noise never met ε and on_unmet is `raise`. `noise` holds the noise so far."""

    def __init__(self, message: str, noise: Noise) -> None:
        super().__init__(message)
        self.noise = noise


class NoiseNotFiniteError(RuntimeError):
    """The noise, or the model's output under it, is NaN or Inf."""


class SynthesisOutOfMemoryError(RuntimeError):
    """The device ran out of memory. `noise` holds the noise so far, or None: in universal mode the bank, with unknown
    influence (NaN), otherwise the noise of the images that were finished."""

    def __init__(self, message: str, noise: Noise | None) -> None:
        super().__init__(message)
        self.noise = noise


class SynthesisInterrupted(KeyboardInterrupt):
    """Ctrl-C during synthesis. `noise` holds the noise so far; pass it as `start` to continue."""

    def __init__(self, noise: Noise) -> None:
        super().__init__("synthesis interrupted")
        self.noise = noise


def synthesize(
    model: nn.Module | SplitViT | FrozenEncoder,
    batches: Tensor | Iterable[Any],
    config: SynthesisConfig | None = None,
    *,
    check: Tensor | Iterable[Any] | None = None,
    start: Noise | Tensor | None = None,
    progress: bool = False,
    mean: Mean | None = None,
) -> Noise:
    """Make noise that hardly changes the model's outputs (universal, per_image), or changes them by ε (boundary).

    The model's weights get no gradient. Its modes and requires_grad flags and the global random generators are the same
    afterwards. The same seed gives the same noise.

    Args:
        model: a ViT, or a FrozenEncoder of it for the site of `config`, whose dtype is then not used.
        batches: one batch [B, C, H, W], a sequence of batches (kept with their clean logits), or a re-iterable such
            as a DataLoader (read again in each round). A batch is images, or a tuple whose first item is images.
        config: see SynthesisConfig.
        check: universal: images to judge the influence on, in the forms of `batches`. None holds out a tenth of the
            batches: the last ones of a sequence, or the first ones of a loader, which a later round may contain if the
            loader shuffles. If there is one batch, it holds out a tenth of its images.
        start: noise to start from instead of random noise, or (config.warm > 0) beside it: [M, ...] (universal), or one
            per image, in order.
        progress: show a progress bar.
        mean: universal: takes the mean of a tensor over several processes. Each process passes its own part of every
            batch and of the check images, and all get the same noise. None is one process.

    Returns:
        Noise: M noises (universal), or one per image, in order.

    Raises:
        ValueError, TypeError: bad configuration; images that are bad, missing or of two sizes; start of another shape
            or site; an argument that the mode does not use.
        EpsilonNotMetError: with on_unmet="raise".
        NoiseNotFiniteError: the noise, or the model's output under it, is NaN or Inf.
        SynthesisOutOfMemoryError: the device ran out of memory.
        SynthesisInterrupted: on Ctrl-C.
    """
    config = config or SynthesisConfig()
    check_mode(config.mode, "config.mode")
    encoder = (
        model if isinstance(model, FrozenEncoder) else FrozenEncoder(model, config.encoder_dtype, site=config.site)
    )
    if encoder.site != config.site:
        raise ValueError(f"config.site is {config.site!r} but the encoder was made for site {encoder.site!r}")
    if isinstance(start, Noise):
        if start.site != config.site:
            raise ValueError(f"start must be noise of site {config.site!r}, as config.site; it is of {start.site!r}")
        start = start.tokens
    if config.mode != "universal" and mean is not None:
        raise ValueError(f"mean is for mode 'universal'; got config.mode={config.mode!r}")
    with preserved(), no_autocast(encoder.device):
        encoder.sync()
        if config.mode == "universal":
            return _universal(encoder, batches, check, config, start, progress, mean)
        return _per_image(encoder, batches, config, start, progress)


def check_mode(mode: str, name: str = "mode") -> None:
    """Raise ValueError for a mode whose noise only arises in training."""
    if mode in ALL_MODES and mode not in MODES:
        raise ValueError(f"{name} must be {', '.join(MODES)}; {mode} noise is not synthesised, finetuning makes it")


def measure_influence(
    model: nn.Module | SplitViT | FrozenEncoder, noise: Noise, batches: Tensor | Iterable[Any]
) -> Tensor:
    """Influence of each of M universal noises, the mean over all images of the batches; [M] in float32."""
    encoder = model if isinstance(model, FrozenEncoder) else FrozenEncoder(model, site=noise.site)
    if encoder.site != noise.site:
        raise ValueError(f"the noise is of site {noise.site!r} but the encoder was made for site {encoder.site!r}")
    with no_autocast(encoder.device):
        pairs = [embed_batch(encoder, batch) for batch in as_batches(batches)]
        if not pairs:
            raise ValueError("batches must hold at least one batch of images; it is empty")
        return judge(encoder, noise.tokens.to(encoder.device), pairs)


def _universal(
    encoder: FrozenEncoder,
    batches: Tensor | Iterable[Any],
    check: Tensor | Iterable[Any] | None,
    config: SynthesisConfig,
    start: Tensor | None,
    progress: bool,
    mean: Mean | None,
) -> Noise:
    data: Batches | None = None
    run: UniversalRun | None = None

    def message() -> str:
        steps, images = len(run.history) if run else 0, f" ({len(data.like)})" if data else ""
        return (
            f"{encoder.device} ran out of memory after {steps} steps: lower the images of a batch{images} or "
            f"config.count ({config.count}), or use a 16-bit encoder."
        )

    def so_far() -> Noise | None:
        return _universal_result(encoder, data, config, run, mean, judged=False) if data and run else None

    with _memory_kept(message, so_far):
        data = Batches(encoder, batches, check, config)
        total = config.steps or config.rounds * data.per_round
        _check_room((config.count, *data.shape), encoder.device)
        shape = (config.count, *data.shape)
        used = at_mean_contrast(config, [tokens for tokens, _ in data.check], mean)
        if start is None:
            bank = bank_start(shape, used, data.like)
        else:
            bank = checked_start(start, shape, data.like)
            bank = warm_start(used, bank) if config.warm else bank
        run = UniversalRun(encoder, data, used, bank, mean)
        bar = progress_bar(total, show=progress, desc="synthesize", unit=" step")
        try:
            run.run(total, bar)
            noise = _universal_result(encoder, data, config, run, mean)
        except KeyboardInterrupt:
            raise SynthesisInterrupted(_universal_result(encoder, data, config, run, mean)) from None
        finally:
            bar.close()
    return _met(noise, config)


@contextmanager
def _memory_kept(message: Callable[[], str], so_far: Callable[[], Noise | None]) -> Iterator[None]:
    """Raise SynthesisOutOfMemoryError, with the noise so far, for the out-of-memory errors of any device."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SynthesisOutOfMemoryError(f"{message()} {error}", so_far()) from error


def _check_room(shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError if a bank of this shape [M, ...] cannot fit the device, before it swaps for hours."""
    needed = BANK_COPIES * 4 * math.prod(shape)
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > room:
        raise ValueError(
            f"count must be smaller: {shape[0]} noises of shape {list(shape[1:])} need about {needed / 1e9:.3g} GB; "
            f"{device} has {room / 1e9:.3g} GB"
        )


def _universal_result(
    encoder: FrozenEncoder,
    data: Batches,
    config: SynthesisConfig,
    run: UniversalRun,
    mean: Mean | None,
    *,
    judged: bool = True,
) -> Noise:
    noise, influences = run.noise, torch.full((config.count,), torch.nan)
    if judged:
        influences = run.influence.clone()
        unknown = influences.isnan()
        if unknown.any():
            influences[unknown] = judge(encoder, noise[unknown], data.check, mean).to(influences.dtype)
        if config.on_unmet == "scale" or config.final_scale:
            noise, influences = scaled_to_eps(
                encoder, noise, influences, data.check, config.eps, larger=config.final_scale, mean=mean
            )
        influences = influences.cpu()
    return Noise(
        tokens=noise,
        influence=influences,
        norm=norms(noise).cpu(),
        converged=influences < config.eps,
        steps=run.taken.cpu(),
        site=config.site,
        metadata=_metadata(encoder, config, check=data.check_origin, check_images=sum(len(t) for t, _ in data.check)),
        history=run.history,
    )


def _per_image(
    encoder: FrozenEncoder,
    batches: Tensor | Iterable[Any],
    config: SynthesisConfig,
    start: Tensor | None,
    progress: bool,
) -> Noise:
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    total = len(batches) if isinstance(batches, Sequence) else None
    solve = replayed_noise(encoder, config)
    size = one_size(batches) if isinstance(batches, Sequence) else None
    images = count_images(batches)
    if start is not None and images is not None and len(start) != images:
        raise ValueError(f"start must hold one noise per image ({images}); it holds {len(start)}")

    def message() -> str:
        return f"{encoder.device} ran out of memory after {done} images: use smaller batches or a 16-bit encoder."

    def so_far() -> Noise | None:
        return _per_image_result(encoder, parts, config) if parts else None

    bar = progress_bar(total, show=progress, desc="synthesize", unit=" batch")
    try:
        with _memory_kept(message, so_far):
            for batch in as_batches(batches):
                tokens, clean = embed_batch(encoder, batch, size)
                size = size or one_size([batch])
                given = None if start is None else start[done : done + len(tokens)]
                numbers = torch.arange(done, done + len(tokens), device=tokens.device)
                first = draw_start(tokens, config, KeyedRandom(config.seed, "image", numbers), given=given)
                noise, _, taken = solve(tokens, clean, *first.tensors)
                if config.on_unmet == "scale":
                    noise = _each_scaled_to_eps(encoder, noise, tokens, clean, config)
                influences = influence(clean, encoder(perturb(encoder, tokens, noise)))
                parts.append((noise.cpu(), influences.cpu(), taken.cpu()))
                done += len(tokens)
                bar.update()
    except KeyboardInterrupt:
        if parts:
            raise SynthesisInterrupted(_per_image_result(encoder, parts, config)) from None
        raise
    finally:
        bar.close()
    if not parts:
        raise ValueError("batches must hold at least one batch of images; it is empty")
    if start is not None and len(start) != done:
        raise ValueError(f"start must hold one noise per image ({done}); it holds {len(start)}")
    return _met(_per_image_result(encoder, parts, config), config)


def _per_image_result(
    encoder: FrozenEncoder, parts: list[tuple[Tensor, Tensor, Tensor]], config: SynthesisConfig
) -> Noise:
    tokens, influences, taken = (torch.cat(column) for column in zip(*parts, strict=True))
    if config.mode == "boundary":
        converged = (influences > config.eps / 2) & (influences < config.eps * 2)
    else:
        converged = influences < config.eps
    return Noise(
        tokens=tokens,
        influence=influences,
        norm=norms(tokens),
        converged=converged,
        steps=taken,
        site=config.site,
        metadata=_metadata(encoder, config, check="each noise on its own image", check_images=len(tokens)),
    )


def _met(noise: Noise, config: SynthesisConfig) -> Noise:
    """The noise, or an error if it is not finite or, with on_unmet="raise", did not converge."""
    finite = torch.isfinite(noise.tokens).flatten(1).all(1).cpu() & torch.isfinite(noise.norm)
    broken = ~finite | (noise.influence.isnan() & (noise.norm > 0))
    if broken.any():
        raise NoiseNotFiniteError(
            f"{int(broken.sum())} of {len(noise)} noises, or the model's outputs under them, are not finite: lower "
            f"config.limit ({config.limit:g}), lr or step_size, or use a model of a wider dtype"
        )
    unmet = int((~noise.converged).sum())
    if unmet and config.on_unmet == "raise":
        worst = float(noise.influence[~noise.converged].max())
        raise EpsilonNotMetError(
            f"{unmet} of {len(noise)} noises did not meet eps = {config.eps:g} (influence up to {worst:.4g}): allow "
            "more steps, a smaller limit, a larger eps, or on_unmet='keep' or 'scale'",
            noise,
        )
    return noise


def _each_scaled_to_eps(
    encoder: FrozenEncoder, noise: Tensor, tokens: Tensor, clean: Tensor, config: SynthesisConfig
) -> Tensor:
    """`scaled_to_eps` for one noise per image, by bisection for all images at once."""

    def below(scale: Tensor) -> Tensor:
        return influence(clean, encoder(perturb(encoder, tokens, expand_as_noise(scale, noise) * noise))) < config.eps

    low = torch.zeros(len(noise), device=noise.device, dtype=noise.dtype)
    high = torch.ones_like(low)
    low = torch.where(below(high), high, low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = below(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return expand_as_noise(low, noise) * noise


def _metadata(encoder: FrozenEncoder, config: SynthesisConfig, **extra: Any) -> dict[str, Any]:
    from fastnull.record import provenance

    return {
        "config": asdict(config),
        **extra,
        "model": type(encoder.vit.network).__name__,
        **provenance(encoder.device, **encoder.about(), seed=config.seed),
    }
