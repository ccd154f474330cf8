"""Noise synthesis: universal banks, noise an image, and noise on the boundary of the approximate nullspace.

universal   One noise is shared by all images: drawn from U(−limit, limit), moved by AdamW until the logits are those
            without it, stopped at influence < ε (paper, Eq. 7 and 9, as its code does it). Here the influence is
            judged on held-out images, the cosine decays over the steps that run, and an unmet ε is never silent.
per_image   Every image has its own noise, which stops at its own ε (ours).
boundary    Every image's noise is driven to influence = ε from either side in a few steps (ours; related: virtual
            adversarial training, friendly adversarial training, level-set methods).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.checks import check_choice, check_finite, check_images, check_number
from fastnull.encoder import FrozenEncoder
from fastnull.noise import Noise
from fastnull.objective import OBJECTIVES, influence
from fastnull.ops import AdamWState, adamw_step
from fastnull.progress import progress_bar
from fastnull.rng import generator, preserved, uniform
from fastnull.solvers import (
    BOUNDARY_STEPS,
    boundary_noise,
    learning_rate,
    log_norm_gradient,
    norms,
    optimized_noise,
    perturb,
    shared_gradient,
    spread,
)
from fastnull.vit.base import SITES, NormalizedModel, SplitViT

MODES = ("universal", "per_image", "boundary")
ON_UNMET = ("keep", "scale", "raise")
SCHEDULES = ("cosine", "constant", "published")
STOPS = ("check", "batch", "never")
BISECTIONS = 20
HELD_OUT = 0.1


@dataclass(frozen=True)
class SynthesisConfig:
    """How noise is made. Lengths are in the units of the site: token units, or pixels in [0, 1].

    Attributes:
        mode: `universal`, `per_image` or `boundary`.
        site: `patch`, `block0` or `pixels`.
        count: universal: number M of noises in the bank.
        limit: the start is drawn from U(−limit, limit).
        eps: the influence that a noise may have.
        objective: `l2` or `l2_squared` distance between logits.
        log_norm_weight: λ of the objective's −λ·log‖v‖ (paper, Eq. 6); 0 leaves it out.
        lr, weight_decay: of AdamW on the noise (universal, per_image).
        steps: most updates a noise gets; None is rounds × the batches of a round (universal) or 30 (others).
        rounds: universal: how often the batches are gone through.
        image_ratio: universal: share of the batches that a round uses.
        schedule: of lr. `cosine` decays over the steps that run; `published` has the published code's period,
            rounds × all batches, of which only image_ratio runs (so it barely decays); or `constant`.
        stop: universal: `check` stops where the influence on the check images is below ε, `batch` where that on the
            current minibatch is (published), `never` runs all steps.
        on_unmet: what happens to a noise that never met ε: `keep` reports it, `scale` bisects its scale to ε, `raise`.
        step_size: boundary: of one step; None is 0.1 × the mean norm of the start at the token sites, 4/255 in pixels.
        seed: of the start.
    """

    mode: str = "universal"
    site: str = "patch"
    count: int = 1
    limit: float = 3.0
    eps: float = 0.03
    objective: str = "l2"
    log_norm_weight: float = 0.0
    lr: float = 0.1
    weight_decay: float = 0.0
    steps: int | None = None
    rounds: int = 3
    image_ratio: float = 1.0
    schedule: str = "cosine"
    stop: str = "check"
    on_unmet: str = "keep"
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", MODES),
            ("site", SITES),
            ("objective", OBJECTIVES),
            ("schedule", SCHEDULES),
            ("stop", STOPS),
            ("on_unmet", ON_UNMET),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_number("eps", self.eps, 0, 2, exclusive=True)
        check_number("limit", self.limit, 0)
        check_number("lr", self.lr, 0, exclusive=True)
        check_number("image_ratio", self.image_ratio, 0, 1, exclusive=True)
        for name in ("weight_decay", "log_norm_weight"):
            check_number(name, getattr(self, name), 0)
        for name in ("count", "rounds"):
            check_number(name, getattr(self, name), 1)
        if self.steps is not None:
            check_number("steps", self.steps, 1)
        if self.step_size is not None:
            check_number("step_size", self.step_size, 0, exclusive=True)

    @classmethod
    def published(cls, name: str = "finetune", **changes: Any) -> SynthesisConfig:
        """The published constants: limit, ε, AdamW's lr with its default weight decay, rounds, stop rule, schedule.

        Args:
            name: `finetune` (the recipe behind the published tables: squared distance, ε 0.03), `first` (the first
                code release: distance, ε 0.01) or `single_gpu` (its small preset: limit 1, ε 0.001, lr 0.02).
            changes: fields to change.
        """
        common = cls(
            limit=3.0, lr=0.1, weight_decay=0.01, rounds=3, image_ratio=0.1, schedule="published", stop="batch"
        )
        presets = {
            "finetune": {"eps": 0.03, "objective": "l2_squared"},
            "first": {"eps": 0.01, "objective": "l2"},
            "single_gpu": {"eps": 0.001, "objective": "l2", "limit": 1.0, "lr": 0.02},
        }
        return replace(common, **{**presets[check_choice("preset", name, presets)], **changes})


class EpsilonNotMetError(RuntimeError):
    """A noise never met ε and on_unmet is `raise`. The noise so far is in `noise`: no work is lost."""

    def __init__(self, message: str, noise: Noise) -> None:
        super().__init__(message)
        self.noise = noise


class SynthesisInterrupted(KeyboardInterrupt):
    """Ctrl-C during synthesis. The noise so far is in `noise`; give it as `start` to go on."""

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
) -> Noise:
    """Make noise that the model's outputs do not see (universal, per_image) or just see (boundary).

    The model's weights get no gradient; its modes, requires_grad flags and the global random generators are afterwards
    as before. The same seed gives the same noise.

    Args:
        model: a ViT or a FrozenEncoder of it (whose site then has to be the configuration's).
        batches: one batch [B, C, H, W], a sequence of batches (kept with their clean logits), or a re-iterable such
            as a DataLoader (read anew each round). A batch is images or a tuple that starts with them.
        config: see SynthesisConfig.
        check: images to judge the universal influence on, as `batches`. None holds out a tenth of the batches (of the
            images where there is one batch; of a loader the first batches, which a shuffled later round can hold).
        start: noise to start from in place of the random one [M, ...] (universal) or [B, ...].
        progress: show a progress bar.

    Returns:
        Noise: M noises (universal) or one an image, in the order of the images.

    Raises:
        ValueError, TypeError: bad configuration, empty or bad images, start of another shape.
        EpsilonNotMetError: with on_unmet="raise".
        SynthesisInterrupted: on Ctrl-C.
    """
    config = config or SynthesisConfig()
    encoder = model if isinstance(model, FrozenEncoder) else FrozenEncoder(model, site=config.site)
    if encoder.site != config.site:
        raise ValueError(f"config.site is {config.site!r} but the encoder was made for site {encoder.site!r}")
    if isinstance(start, Noise):
        start = start.tokens
    with preserved():
        encoder.sync()
        if config.mode == "universal":
            return _universal(encoder, _Batches(encoder, batches, check, config), config, start, progress)
        return _per_image(encoder, batches, config, start, progress)


def measure_influence(
    model: nn.Module | SplitViT | FrozenEncoder, noise: Noise, batches: Tensor | Iterable[Any]
) -> Tensor:
    """Influence of each of M universal noises: mean over all images of the batches; [M] in float32."""
    encoder = model if isinstance(model, FrozenEncoder) else FrozenEncoder(model, site=noise.site)
    pairs = [_embed(encoder, batch) for batch in _as_batches(batches)]
    if not pairs:
        raise ValueError("batches must hold at least one batch of images; it is empty")
    return torch.stack([_judge(encoder, row, pairs) for row in noise.tokens.to(encoder.device)])


def _universal(
    encoder: FrozenEncoder, data: _Batches, config: SynthesisConfig, start: Tensor | None, progress: bool
) -> Noise:
    total = config.steps or config.rounds * data.per_round
    period = config.rounds * data.batches if config.schedule == "published" else total
    noise = _starts((config.count, *data.shape), config, data.like, start)  # [M, ...]
    state = AdamWState.zeros(noise)
    active = torch.ones(config.count, dtype=torch.bool, device=noise.device)
    history: list[dict[str, float]] = []
    bar = progress_bar(total, show=progress, desc="synthesize", unit=" step")
    try:
        for step, (tokens, clean) in zip(range(total), data.stream(), strict=False):
            seen = torch.full((config.count,), math.nan)
            losses = torch.full((config.count,), math.nan)
            gradient = torch.zeros_like(noise)
            for m in torch.nonzero(active).flatten().tolist():
                losses[m], seen[m], gradient[m] = shared_gradient(encoder, tokens, clean, noise[m], config.objective)
                met = bool(seen[m] < config.eps)
                # the minibatch is the cheap sign that the check images are worth a look
                if met and config.stop == "check":
                    met = bool(_judge(encoder, noise[m], data.check) < config.eps)
                active[m] = not met or config.stop == "never"
            shown = {"loss": _nanmean(losses), "influence": _nanmean(seen), "norm": float(norms(noise).mean())}
            history.append({"step": step, **shown})
            bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()}, refresh=False)
            if not bool(active.any()):
                break
            gradient = gradient - log_norm_gradient(noise, config.log_norm_weight)
            lr = learning_rate(config, step, period)
            adamw_step(noise, gradient, state, active.float(), lr=lr, weight_decay=config.weight_decay)
            bar.update()
    except KeyboardInterrupt:
        raise SynthesisInterrupted(_universal_result(encoder, data, config, noise, state.steps, history)) from None
    finally:
        bar.close()
    return _met(_universal_result(encoder, data, config, noise, state.steps, history), config)


def _universal_result(
    encoder: FrozenEncoder,
    data: _Batches,
    config: SynthesisConfig,
    noise: Tensor,
    taken: Tensor,
    history: list[dict[str, float]],
) -> Noise:
    if config.on_unmet == "scale":
        noise = torch.stack([_scaled_to_eps(encoder, row, data.check, config.eps) for row in noise])
    judged = torch.stack([_judge(encoder, row, data.check) for row in noise]).cpu()
    return Noise(
        tokens=noise,
        influence=judged,
        norm=norms(noise).cpu(),
        converged=judged < config.eps,
        steps=taken.cpu(),
        site=config.site,
        metadata=_metadata(encoder, config, check=data.check_origin, check_images=sum(len(t) for t, _ in data.check)),
        history=history,
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
    bar = progress_bar(total, show=progress, desc="synthesize", unit=" batch")
    try:
        for index, batch in enumerate(_as_batches(batches)):
            tokens, clean = _embed(encoder, batch)
            given = None if start is None else start[done : done + len(tokens)]
            first = _starts(tuple(tokens.shape), config, tokens, given, index)
            if config.mode == "boundary":
                noise, _ = boundary_noise(encoder, tokens, first, config)
                taken = torch.full((len(tokens),), config.steps or BOUNDARY_STEPS)
            else:
                noise, _, taken = optimized_noise(encoder, tokens, first, config)
            if config.on_unmet == "scale":
                noise = _each_scaled_to_eps(encoder, noise, tokens, clean, config)
            parts.append((noise.cpu(), influence(clean, encoder(perturb(encoder, tokens, noise))).cpu(), taken.cpu()))
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
    return _met(_per_image_result(encoder, parts, config), config)


def _per_image_result(
    encoder: FrozenEncoder, parts: list[tuple[Tensor, Tensor, Tensor]], config: SynthesisConfig
) -> Noise:
    tokens, seen, taken = (torch.cat(column) for column in zip(*parts, strict=True))
    if config.mode == "boundary":
        converged = (seen > config.eps / 2) & (seen < config.eps * 2)
    else:
        converged = seen < config.eps
    return Noise(
        tokens=tokens,
        influence=seen,
        norm=norms(tokens),
        converged=converged,
        steps=taken,
        site=config.site,
        metadata=_metadata(encoder, config, check="each noise on its own image", check_images=len(tokens)),
    )


def _met(noise: Noise, config: SynthesisConfig) -> Noise:
    """Apply on_unmet="raise"."""
    unmet = int((~noise.converged).sum())
    if unmet and config.on_unmet == "raise":
        worst = float(noise.influence[~noise.converged].max())
        raise EpsilonNotMetError(
            f"{unmet} of {len(noise)} noises did not meet eps = {config.eps:g} (influence up to {worst:.4g}): allow "
            "more steps, a smaller limit, a larger eps, or on_unmet='keep' or 'scale'",
            noise,
        )
    return noise


class _Batches:
    """Images for universal synthesis: clean tokens and logits kept for sequences, made anew for loaders."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        source: Tensor | Iterable[Any],
        check: Tensor | Iterable[Any] | None,
        config: SynthesisConfig,
    ) -> None:
        self._encoder = encoder
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        source, held_out, self.check_origin = _hold_out(source, check, config)
        self._source = source
        self.batches = _length(source)
        if not self.batches:
            raise ValueError("batches must hold at least one batch of images; it is empty")
        # the published int(); but a round has at least one batch
        self.per_round = max(1, int(config.image_ratio * self.batches))
        if held_out is None:  # published: nothing is held out, the training images are judged
            self.check = [pair for pair, _ in zip(self._round(), range(self.per_round), strict=False)]
        else:
            self.check = [_embed(encoder, batch) for batch in held_out]
        if not self.check:
            raise ValueError("check must hold at least one batch of images; it is empty")
        self.like = self.check[0][0]
        self.shape = tuple(self.like.shape[1:])

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Clean tokens and logits, round after round without end."""
        while True:
            empty = True
            for pair, _ in zip(self._round(), range(self.per_round), strict=False):
                empty = False
                yield pair
            if empty:
                raise ValueError("batches gave no images in a later round: give a sequence or a re-iterable loader")

    def _round(self) -> Iterator[tuple[Tensor, Tensor]]:
        kept = isinstance(self._source, Sequence)
        for index, batch in enumerate(self._source):
            if kept and index not in self._kept:
                self._kept[index] = _embed(self._encoder, batch)
            yield self._kept[index] if kept else _embed(self._encoder, batch)


def _hold_out(
    source: Tensor | Iterable[Any], check: Tensor | Iterable[Any] | None, config: SynthesisConfig
) -> tuple[Iterable[Any], list[Any] | None, str]:
    """Training batches, check batches (None: those trained on) and where the latter come from."""
    source = [source] if isinstance(source, Tensor) else source
    if check is not None:
        return source, list(_as_batches(check)), "given"
    if not isinstance(source, Sequence):
        count = max(1, round(HELD_OUT * _length(source)))
        return source, [batch for batch, _ in zip(source, range(count), strict=False)], "first batches of the loader"
    if config.stop != "check":
        return source, None, "the training images"
    if len(source) > 1:
        count = max(1, round(HELD_OUT * len(source)))
        return source[:-count], list(source[-count:]), "held-out batches"
    images = _images(source[0]) if source else None
    if isinstance(images, Tensor) and len(images) > 1:
        count = max(1, round(HELD_OUT * len(images)))
        return [images[:-count]], [images[-count:]], "held-out images"
    return source, None, "the training images"


def _length(source: Any) -> int:
    if iter(source) is source:
        raise ValueError("batches is an iterator, which can be read once; give a list, a tensor or a DataLoader")
    try:
        return len(source)
    except TypeError as error:
        raise ValueError("batches has no length; give a list, a tensor or a sized DataLoader") from error


def _as_batches(source: Tensor | Iterable[Any]) -> Iterator[Any]:
    yield from (source,) if isinstance(source, Tensor) else source


def _images(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _embed(encoder: FrozenEncoder, batch: Any) -> tuple[Tensor, Tensor]:
    """Check a batch; return its clean tokens at the site [B, ...] and logits [B, K]."""
    images = _images(batch)
    check_batch(encoder, images)
    tokens = encoder.embed(images.to(encoder.device))
    clean = encoder(tokens)
    check_finite("logits of the clean images", clean)
    return tokens, clean


def check_batch(encoder: FrozenEncoder, images: Any) -> None:
    """Check images against the model: shape, dtype and, where the model takes pixels, the range [0, 1]."""
    vit = encoder.vit
    takes_pixels = isinstance(vit.model, NormalizedModel) or encoder.site == "pixels"
    check_images(images, channels=vit.channels, size=vit.image_size, unit_range=takes_pixels)
    if len(images) == 0:
        raise ValueError("images must hold at least one image; the batch is empty")


def _starts(
    shape: tuple[int, ...], config: SynthesisConfig, like: Tensor, given: Tensor | None, index: int = 0
) -> Tensor:
    if given is None:
        source = generator(config.seed, index)
        rows = [uniform(shape[1:], config.limit, source, like) for _ in range(shape[0])]
        return torch.stack(rows)
    if tuple(given.shape) != shape:
        raise ValueError(f"start must have shape {list(shape)}; got {list(given.shape)}")
    check_finite("start", given)
    return given.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32, copy=True)


def _judge(encoder: FrozenEncoder, noise: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Influence of one noise: mean over all images."""
    seen = [influence(clean, encoder(perturb(encoder, tokens, noise))) for tokens, clean in pairs]
    return torch.cat(seen).mean()


def _scaled_to_eps(encoder: FrozenEncoder, noise: Tensor, pairs: list[tuple[Tensor, Tensor]], eps: float) -> Tensor:
    """The noise, or the largest scale of it that bisection finds below ε."""
    if bool(_judge(encoder, noise, pairs) < eps):
        return noise
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = bool(_judge(encoder, noise * middle, pairs) < eps)
        low, high = (middle, high) if below else (low, middle)
    return noise * low


def _each_scaled_to_eps(
    encoder: FrozenEncoder, noise: Tensor, tokens: Tensor, clean: Tensor, config: SynthesisConfig
) -> Tensor:
    """`_scaled_to_eps` for one noise an image, all images at once."""

    def below(scale: Tensor) -> Tensor:
        return influence(clean, encoder(perturb(encoder, tokens, spread(scale, noise) * noise))) < config.eps

    low = torch.zeros(len(noise), device=noise.device, dtype=noise.dtype)
    high = torch.ones_like(low)
    low = torch.where(below(high), high, low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = below(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return spread(low, noise) * noise


def _nanmean(values: Tensor) -> float:
    return float(values.nanmean())


def _metadata(encoder: FrozenEncoder, config: SynthesisConfig, **extra: Any) -> dict[str, Any]:
    from fastnull.record import provenance

    return {
        "config": asdict(config),
        **extra,
        "model": type(encoder.vit.network).__name__,
        **provenance(
            encoder.device,
            dtype=str(encoder.dtype),
            products=str(encoder.products),
            backend=encoder.backend,
            seed=config.seed,
        ),
    }
