"""Noise synthesis: universal banks, noise an image, and noise on the boundary of the approximate nullspace.

- `universal`: one noise is shared by all images: drawn from U(−limit, limit), moved until the outputs are those without
  it, stopped at influence < ε (paper, Eq. 7 and 9; by AdamW on the logits as its code does it, or faster by
  Gauss-Newton). Here the influence is judged on held-out images, the cosine decays over the steps that run, and an
  unmet ε is never silent.
- `per_image`: every image has its own noise, which stops at its own ε (ours).
- `boundary`: every image's noise is driven to influence = ε from either side in a few steps (ours; related: virtual
  adversarial training, friendly adversarial training, level-set methods).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.batches import Batches, as_batches, count_images, embed_batch, one_size
from fastnull.checks import check_choice, check_fields, check_finite, check_number, is_out_of_memory
from fastnull.encoder import FrozenEncoder
from fastnull.noise import Noise
from fastnull.objective import OBJECTIVES, PREDICTION, influence
from fastnull.ops.common import no_autocast
from fastnull.progress import progress_bar
from fastnull.replay import Replay, use_graph
from fastnull.rng import generator, preserved
from fastnull.solvers import norms, own_noise, perturb, spread
from fastnull.starts import in_proportion, start_noise, step_sizes
from fastnull.universal import Mean, UniversalRun, judge, scaled_to_eps
from fastnull.vit.base import SITES, SplitViT

MODES = ("universal", "per_image", "boundary")
BANK_COPIES = 6
"""Tensors as large as the bank that a universal run has at once: noise, change, moments, and a step's own."""
BISECTIONS = 20
MOST_NOISES = 100_000
"""In a bank. Each costs a pass over every batch of images in every step."""
ON_UNMET = ("keep", "scale", "raise")
SCHEDULES = ("cosine", "constant", "published")
SOLVERS = ("gauss_newton", "adamw")
LR = 0.1
STOPS = ("check", "batch", "never")


@dataclass(frozen=True)
class SynthesisConfig:
    """How noise is made. Lengths are in the units of the site: token units, or pixels in [0, 1].

    Attributes:
        mode: `universal`, `per_image` or `boundary`.
        site: `patch`, `block0` or `pixels`.
        count: universal: number M of noises in the bank.
        limit: the start is drawn from U(−limit, limit).
        limit_spread: each start has a limit of its own, drawn from U((1 − spread)·limit, limit).
        smooth_limit: in pixels: a smooth field of up to this strength is added to each start, see fastnull.starts.
        contrast: in pixels, boundary or per_image: start and step are for images of this contrast (standard deviation
            of an image's values) and in proportion for others, see fastnull.starts.in_proportion; 0: alike for all.
        eps: the influence that a noise may have.
        solver: universal: `gauss_newton` takes the change of every image's probabilities for itself, see
            fastnull.gauss_newton; `adamw` follows the gradient of the mean distance between logits (published). None is
            adamw where one of its settings is given (lr, weight_decay, another objective than l2), else gauss_newton.
        radius: gauss_newton: longest step, as a share of the noise's norm.
        objective: `l2` or `l2_squared` distance between logits (adamw; in the other modes too), or (boundary)
            `prediction`: the cross entropy against the class predicted without noise.
        log_norm_weight: λ of the objective's −λ·log‖v‖ (paper, Eq. 6); 0 leaves it out.
        lr, weight_decay: of AdamW on the noise (universal, per_image); lr None is 0.1.
        steps: most updates a noise gets; None is rounds × the batches of a round (universal) or 30 (others).
        rounds: universal: how often the batches are gone through.
        image_ratio: universal: share of the batches that a round uses.
        schedule: of lr or radius. `cosine` decays over the steps that run; `published` has the published code's period,
            rounds × all batches, of which only image_ratio runs (so it barely decays); or `constant`.
        stop: universal: `check` stops where the influence on the check images is below ε, `batch` where that on the
            current minibatch is (published), `never` runs all steps.
        on_unmet: what happens to a noise that never met ε: `keep` reports it, `scale` bisects its scale to ε, `raise`.
        step_size: boundary: of one step; None is 0.1 × the mean norm of the start at the token sites, 4/255 in pixels.
        step_spread: boundary: each noise has a step of its own, drawn from U((1 − spread)·step_size, step_size).
        keep: universal: keep clean tokens and logits of the first round on the device for the later ones, where half of
            a GPU's free memory holds them (else a warning). None does so for sequences, True for what a loader gave too
            (the later rounds then see the images of the first, in its order), False never.
        warm: universal: share of the last bank in the start of NullspaceAugment.refresh; the rest is fresh.
        growing: universal: start with an eighth of each batch, and double it whenever all noises meet ε on theirs.
        final_scale: universal: afterwards scale each noise, up or down, until its influence on the check images is just
            below ε.
        graph: run steps in a CUDA graph; None does so on the cuda backend. The host then learns after 8 to
            15 steps that a noise met ε; with stop="check" the noise goes on until then.
        seed: of the start.
    """

    mode: str = "universal"
    site: str = "patch"
    count: int = 1
    limit: float = 3.0
    limit_spread: float = 0.0
    smooth_limit: float = 0.0
    contrast: float = 0.0
    eps: float = 0.03
    objective: str = "l2"
    log_norm_weight: float = 0.0
    solver: str | None = None
    radius: float = 0.1
    lr: float | None = None
    weight_decay: float = 0.0
    steps: int | None = None
    rounds: int = 3
    image_ratio: float = 1.0
    schedule: str = "cosine"
    stop: str = "check"
    on_unmet: str = "keep"
    step_size: float | None = None
    step_spread: float = 0.0
    keep: bool | None = None
    warm: float = 0.0
    growing: bool = False
    final_scale: bool = False
    graph: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
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
        for name in ("limit", "smooth_limit", "contrast"):
            check_number(name, getattr(self, name), 0)
        for name in ("smooth_limit", "contrast"):
            if getattr(self, name) and self.site != "pixels":
                raise ValueError(f"{name} is for site 'pixels'; got site={self.site!r}")
        if self.contrast and self.mode == "universal":
            raise ValueError("contrast is for noise of an image's own; mode 'universal' has one for all")
        if self.objective == PREDICTION and self.mode != "boundary":
            raise ValueError(f"objective {PREDICTION!r} is for mode 'boundary'; got mode={self.mode!r}")
        for name in ("limit_spread", "step_spread"):
            check_number(name, getattr(self, name), 0, 1)
        check_number("warm", self.warm, 0, 1)
        check_number("radius", self.radius, 0, exclusive=True)
        if self.lr is not None:
            check_number("lr", self.lr, 0, exclusive=True)
        check_number("image_ratio", self.image_ratio, 0, 1, exclusive=True)
        for name in ("weight_decay", "log_norm_weight"):
            check_number(name, getattr(self, name), 0)
        check_number("count", self.count, 1, MOST_NOISES)
        check_number("rounds", self.rounds, 1)
        if self.steps is not None:
            check_number("steps", self.steps, 1)
        if self.step_size is not None:
            check_number("step_size", self.step_size, 0, exclusive=True)
        if self.solver is not None:
            check_choice("solver", self.solver, SOLVERS)
        if self.solver == "gauss_newton" and self._asks_for_adamw:
            raise ValueError("lr, weight_decay and objective are settings of solver 'adamw'; 'gauss_newton' has radius")

    @property
    def _asks_for_adamw(self) -> bool:
        return self.lr is not None or self.weight_decay > 0 or self.objective != "l2"

    @property
    def rule(self) -> str:
        """The solver in use: `gauss_newton` or `adamw`."""
        if self.mode != "universal":
            return "adamw"
        return self.solver or ("adamw" if self._asks_for_adamw else "gauss_newton")

    @property
    def rate(self) -> float:
        """What the schedule starts from: lr of adamw, radius of gauss_newton."""
        return self.radius if self.rule == "gauss_newton" else self.lr or LR

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


class NoiseNotFiniteError(RuntimeError):
    """The synthesis left float32: noise of NaN or Inf, or noise under which the model's outputs are NaN."""


class SynthesisOutOfMemoryError(RuntimeError):
    """The device ran out of memory. No work is lost: the noise so far is in `noise`, in universal mode with an unknown
    influence (NaN), else that of the images before; None where there is none yet."""

    def __init__(self, message: str, noise: Noise | None) -> None:
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
    mean: Mean | None = None,
) -> Noise:
    """Make noise that the model's outputs do not see (universal, per_image) or just see (boundary).

    The model's weights get no gradient; its modes, requires_grad flags and the global random generators are afterwards
    as before. The same seed gives the same noise.

    Args:
        model: a ViT or a FrozenEncoder of it (whose site then has to be the configuration's).
        batches: one batch [B, C, H, W], a sequence of batches (kept with their clean logits), or a re-iterable such
            as a DataLoader (read anew each round). A batch is images or a tuple that starts with them.
        config: see SynthesisConfig.
        check: images to judge the universal influence on, as `batches`; the other modes have no use for them. None
            holds out a tenth of the batches (of the images where there is one batch; of a loader the first batches,
            which a shuffled later round can hold).
        start: noise to start from in place of the random one: [M, ...] (universal), or one an image, in the order of
            all images.
        progress: show a progress bar.
        mean: universal: takes a tensor's mean over several processes, each of which gives its own part of every batch
            and of the check images; all get the same noise. None: this process is alone.

    Returns:
        Noise: M noises (universal) or one an image, in the order of the images.

    Raises:
        ValueError, TypeError: bad configuration, empty or bad images or of two sizes, start of another shape or site,
            an argument that the mode has no use for.
        EpsilonNotMetError: with on_unmet="raise".
        NoiseNotFiniteError: the noise, or the model's output under it, is NaN or Inf.
        SynthesisOutOfMemoryError: the device ran out of memory.
        SynthesisInterrupted: on Ctrl-C.
    """
    config = config or SynthesisConfig()
    encoder = model if isinstance(model, FrozenEncoder) else FrozenEncoder(model, site=config.site)
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


def measure_influence(
    model: nn.Module | SplitViT | FrozenEncoder, noise: Noise, batches: Tensor | Iterable[Any]
) -> Tensor:
    """Influence of each of M universal noises: mean over all images of the batches; [M] in float32."""
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
        run = UniversalRun(encoder, data, config, _starts((config.count, *data.shape), config, data.like, start), mean)
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
    """Make SynthesisOutOfMemoryError, with the noise so far, of a device's own error: a CPU has no class for it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SynthesisOutOfMemoryError(f"{message()} {error}", so_far()) from error


def _check_room(shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError where a bank of this shape [M, ...] can never fit the device: before it swaps for hours."""
    needed = BANK_COPIES * 4 * math.prod(shape)
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > room:
        raise ValueError(
            f"count must be less: {shape[0]} noises of {list(shape[1:])} with their steps need about "
            f"{needed / 1e9:.3g} GB; {device} has {room / 1e9:.3g} GB"
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
    noise, seen = run.noise, torch.full((config.count,), torch.nan)
    if judged:
        seen = run.seen.clone()
        unknown = seen.isnan()
        if unknown.any():
            seen[unknown] = judge(encoder, noise[unknown], data.check, mean).to(seen.dtype)
        if config.on_unmet == "scale" or config.final_scale:
            noise, seen = scaled_to_eps(
                encoder, noise, seen, data.check, config.eps, larger=config.final_scale, mean=mean
            )
        seen = seen.cpu()
    return Noise(
        tokens=noise,
        influence=seen,
        norm=norms(noise).cpu(),
        converged=seen < config.eps,
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
    graph = use_graph(config.graph, encoder.device, encoder.backend)
    solve = Replay(lambda tokens, clean, first, *size: own_noise(encoder, tokens, clean, first, config, *size), graph)
    size = one_size(batches) if isinstance(batches, Sequence) else None
    images = count_images(batches)
    if start is not None and images is not None and len(start) != images:
        raise ValueError(f"start must hold one noise an image ({images}); it holds {len(start)}")

    def message() -> str:
        return f"{encoder.device} ran out of memory after {done} images: give smaller batches, or use a 16-bit encoder."

    def so_far() -> Noise | None:
        return _per_image_result(encoder, parts, config) if parts else None

    bar = progress_bar(total, show=progress, desc="synthesize", unit=" batch")
    try:
        with _memory_kept(message, so_far):
            for index, batch in enumerate(as_batches(batches)):
                tokens, clean = embed_batch(encoder, batch, size)
                size = size or one_size([batch])
                given = None if start is None else start[done : done + len(tokens)]
                first = _starts(tuple(tokens.shape), config, tokens, given, index)
                step = step_sizes(first, config, generator(config.seed, index, 1))
                if given is None:
                    first, step = in_proportion(tokens, first, step, config)
                noise, _, taken = solve(tokens, clean, first, *([step] if isinstance(step, Tensor) else []))
                if config.on_unmet == "scale":
                    noise = _each_scaled_to_eps(encoder, noise, tokens, clean, config)
                seen = influence(clean, encoder(perturb(encoder, tokens, noise)))
                parts.append((noise.cpu(), seen.cpu(), taken.cpu()))
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
        raise ValueError(f"start must hold one noise an image ({done}); it holds {len(start)}")
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
    """Noise that is what it says, or an error: finite, and with on_unmet="raise" converged."""
    finite = torch.isfinite(noise.tokens).flatten(1).all(1).cpu() & torch.isfinite(noise.norm)
    broken = ~finite | (noise.influence.isnan() & (noise.norm > 0))
    if broken.any():
        raise NoiseNotFiniteError(
            f"{int(broken.sum())} of {len(noise)} noises, or the model's outputs under them, are not finite: lower "
            f"config.limit ({config.limit:g}), lr or step_size, or give a model of a wider dtype"
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


def _starts(
    shape: tuple[int, ...], config: SynthesisConfig, like: Tensor, given: Tensor | None, index: int = 0
) -> Tensor:
    if given is None:
        source = generator(config.seed, index)
        return torch.cat([start_noise((1, *shape[1:]), config, source, like) for _ in range(shape[0])])
    if tuple(given.shape) != shape:
        raise ValueError(f"start must have shape {list(shape)}; got {list(given.shape)}")
    if not given.is_floating_point():
        raise TypeError(f"start must be of a floating dtype; got {given.dtype}")
    check_finite("start", given)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return given.detach().to(like.device, dtype, copy=True, memory_format=torch.contiguous_format)


def warm_start(config: SynthesisConfig, last: Tensor) -> Tensor:
    """What `synthesize` draws for config.seed, mixed with the last bank [M, ...]; each noise as long as the fresh one.

    Directions are mixed, share config.warm of the last: noise that has shrunk in its synthesis counts as much.
    """
    fresh = _starts(tuple(last.shape), config, last, None)
    length = spread(norms(fresh), fresh)
    old = last * (length / spread(norms(last), last).clamp_min(1e-30))
    mixed = config.warm * old + (1 - config.warm) * fresh
    return mixed * (length / spread(norms(mixed), mixed).clamp_min(1e-30))


def _each_scaled_to_eps(
    encoder: FrozenEncoder, noise: Tensor, tokens: Tensor, clean: Tensor, config: SynthesisConfig
) -> Tensor:
    """`scaled_to_eps` for one noise an image, all images at once."""

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
            mlp_dtype=str(encoder.mlp_dtype or encoder.products),
            backend=encoder.backend,
            seed=config.seed,
        ),
    }
