"""Universal synthesis: M noises shared by all images, moved together; each stops on its own.

A step takes one batch: one pass of the encoder gives the gradients of all noises, and one Gauss-Newton or AdamW step
moves those that have not stopped. A noise whose influence on the batch is below ε is marked on the device. The host
reads the marks and applies the stop rule: after each step, or with a CUDA graph every LOOK_EVERY steps, to the marks of
the look before (see replay.Report).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnull.encoder.frozen import FrozenEncoder
from fastnull.ops import AdamWState, adamw_step
from fastnull.synthesis.batches import Batches, Pair
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.gauss_newton import gauss_newton_step
from fastnull.synthesis.objective import influence
from fastnull.synthesis.replay import Replay, Report, use_graph
from fastnull.synthesis.solvers import (
    decay,
    expand_as_noise,
    log_norm_gradient,
    norms,
    perturb,
    shared_gradient,
    shared_rows,
)

SEARCHES = 20
CLOSE = 0.985
"""A noise scaled to ε has at least this fraction of it as influence, if the search converges."""
MARGIN = 0.05
"""Fraction of its bracket that a scale keeps from both ends."""
LARGEST_SCALE = 4.0
LOOK_EVERY = 8
"""Steps between two looks of the host, with a CUDA graph."""
COLUMNS = ("loss", "influence", "norm")
"""Columns of a step's record."""
FIRST_DIVISOR = 8
"""`growing` starts with a batch divided by this."""
MOST_IMAGES = 512
"""Noisy images in one pass of the encoder: noises × images."""

Mean = Callable[[Tensor], Tensor]
"""Takes the mean of a tensor over processes; all get the same result."""


class UniversalRun:
    """A run of the synthesis of M noises.

    Args:
        encoder: at the site.
        data: batches and check images.
        config: settings of the synthesis.
        start: [M, ...] in float32 or float64; changed in place.
        mean: takes means over the processes, each of which has a part of every batch; None is one process. With `mean`
            no CUDA graph is used, since a graph cannot hold the exchange.

    Attributes:
        noise: the noises so far [M, ...].
        taken: number of updates of each noise [M], int64.
        influence: on the check images [M], for the noises that stopped by it; NaN for the others, not yet judged.
        history: a record per step: step, loss, influence, norm; means over the noises that took part.
    """

    def __init__(
        self, encoder: FrozenEncoder, data: Batches, config: SynthesisConfig, start: Tensor, mean: Mean | None = None
    ) -> None:
        self._encoder, self._data, self._config, self._mean = encoder, data, config, mean
        self.noise = start
        self._adamw = AdamWState.zeros(start) if config.rule == "adamw" else None
        self.taken = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        self.influence = start.new_full((len(start),), math.nan)
        self._active = torch.ones(len(start), dtype=torch.bool, device=start.device)
        self._marked = torch.zeros_like(self._active)
        self._left = set(range(len(start)))  # the active noises, as far as the host knows
        self._divisor = FIRST_DIVISOR if config.growing else 1
        self._records = torch.full((1, 3), math.nan, device=start.device, dtype=torch.float32)
        self._done = 0
        graph = mean is None and use_graph(config.graph, encoder.device, encoder.backend)
        self._look_every = LOOK_EVERY if graph else 1
        self._report = Report(self._status()) if graph else None
        # a graph is fixed, so all noises take part in its steps; without a graph only those that still move
        self._all = graph
        moments = () if self._adamw is None else (self._adamw.exp_avg, self._adamw.exp_avg_sq, self._adamw.steps)
        changed = (self.noise, self.taken, self._marked, *moments)
        self._step = Replay(self._one_step, graph, changed, lambda: self._moving().any(), encoder.buffers)

    @property
    def history(self) -> list[dict[str, float]]:
        """A record per step."""
        rows = self._records[: self._done].tolist()
        return [{"step": step, **dict(zip(COLUMNS, row, strict=True))} for step, row in enumerate(rows)]

    def run(self, total: int, bar: Any) -> None:
        """Run up to `total` steps; `bar` is a tqdm bar."""
        config, data = self._config, self._data
        period = config.rounds * data.batches if config.schedule == "published" else total
        self._records = self._records.new_empty(total, 3)
        rates = [config.rate * decay(config, step, period) for step in range(total)]
        # copied once, since a copy to the device in each step would wait for the step before
        lr = torch.tensor(rates, dtype=torch.float64).to(self._records.device)
        for step, pair in zip(range(total), data.stream(), strict=False):
            tokens, clean = self._part(pair)
            (record,) = self._step(tokens, clean, lr[step])
            self._records[step] = record
            self._done = step + 1
            bar.update()
            if ((step + 1) % self._look_every == 0 or step + 1 == total) and self._look(bar):
                break

    def _one_step(self, tokens: Tensor, clean: Tensor, lr: Tensor) -> tuple[Tensor]:
        """One step of all noises that move; returns its record [3]."""
        config = self._config
        holds, moving = config.stop == "batch", self._moving()
        rows = torch.arange(len(moving), device=moving.device) if self._all else moving.nonzero().flatten()
        change = torch.zeros_like(self.noise)
        unknown = torch.full((len(moving),), math.nan, device=moving.device, dtype=torch.float32)
        losses, influences = unknown, unknown.clone()
        parts = rows.split(max(1, MOST_IMAGES // len(tokens))) if len(rows) else ()
        for part in parts:
            loss, found, change[part] = self._judged_and_moved(tokens, clean, self.noise[part], lr)
            losses[part], influences[part] = loss.float(), found.float()
        losses, influences = torch.where(moving, losses, math.nan), torch.where(moving, influences, math.nan)
        record = torch.stack([losses.nanmean(), influences.nanmean(), norms(self.noise).mean().float()])
        self._marked |= influences < config.eps
        gate = moving & ~self._marked if holds else moving
        if self._adamw is None:
            self.noise.copy_(torch.where(expand_as_noise(gate, change), self.noise + change, self.noise))
        else:
            adamw_step(self.noise, change, self._adamw, gate.float(), lr=lr, weight_decay=config.weight_decay)
        self.taken += gate
        return (record,)

    def _moving(self) -> Tensor:
        """Mask of the noises [M] that a step moves, unless they are below ε on its batch."""
        # the published rule tests before it updates; with check images a noise moves until the host has looked
        return self._active & ~self._marked if self._config.stop == "batch" else self._active.clone()

    def _judged_and_moved(
        self, tokens: Tensor, clean: Tensor, noise: Tensor, lr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean distance [m] and influence [m] of noises [m, ...] on a batch, and AdamW's gradient or the whole step."""
        config, mean = self._config, self._mean
        pull = log_norm_gradient(noise, config.log_norm_weight)
        if self._adamw is None:
            changes, rows = shared_rows(self._encoder, tokens, clean, noise)
            loss, influences = changes.mean(1), changes.square().mean(1)
            change = gauss_newton_step(noise, changes, rows, lr.to(noise.dtype), pull, mean)
        else:
            loss, influences, gradient = shared_gradient(self._encoder, tokens, clean, noise, config.objective)
            change = (gradient if mean is None else mean(gradient)) - pull
        if mean is not None:
            loss, influences = mean(loss), mean(influences)
        return loss, influences, change

    def _part(self, pair: Pair) -> Pair:
        """The part of a batch that a step uses."""
        count = -(-len(pair[0]) // self._divisor)
        return pair[0][:count], pair[1][:count]

    def _status(self) -> Tensor:
        """What the host looks at: the last record, and 1 for each marked noise [3 + M]."""
        return torch.cat([self._records[max(self._done - 1, 0)], (self._marked & self._active).float()])

    def _look(self, bar: Any) -> bool:
        """Update the bar, and grow the batch or stop noises; True if no noise is left."""
        status = self._status().tolist() if self._report is None else self._report.read()
        if status is not None:
            columns = zip(COLUMNS, status, strict=False)
            bar.set_postfix({name: f"{value:.3g}" for name, value in columns}, refresh=False)
            self._act([m for m, mark in enumerate(status[3:]) if mark])
        if self._report is not None:
            self._report.send(self._status())
        return not self._left

    def _act(self, marked: list[int]) -> None:
        """Grow the batch if all remaining noises are marked, or apply the stop rule to the marked ones."""
        config = self._config
        if self._divisor > 1:
            if self._left <= set(marked):
                self._divisor //= 2
                self._marked.zero_()
        elif config.stop != "never" and marked:
            ends = dict.fromkeys(marked, math.nan)
            if config.stop == "check":
                influences = judge(self._encoder, self.noise[marked], self._data.check, self._mean).tolist()
                ends = {m: value for m, value in zip(marked, influences, strict=True) if value < config.eps}
            for m, value in ends.items():
                self._active[m], self.influence[m] = False, value
                self._left.discard(m)
            self._marked[marked] = False


def judge(encoder: FrozenEncoder, noise: Tensor, pairs: list[Pair], mean: Mean | None = None) -> Tensor:
    """Influence [M] of noises [M, ...], the mean over all images, including those of other processes."""
    influences = torch.cat([_influences(encoder, noise, *pair) for pair in pairs], dim=1)  # [M, images]
    if mean is None:
        return influences.mean(1)
    images = influences.new_full((len(influences),), influences.shape[1])
    total, images = mean(torch.stack([influences.sum(1), images]))  # processes may hold different numbers of images
    return total / images


def _influences(encoder: FrozenEncoder, noise: Tensor, tokens: Tensor, clean: Tensor) -> Tensor:
    """Influence [M, B] of each noise [M, ...] on each image [B, ...], at most MOST_IMAGES in a pass."""
    parts = []
    for part in noise.split(max(1, MOST_IMAGES // len(tokens))):
        logits = encoder(perturb(encoder, tokens, part.unsqueeze(1)).flatten(0, 1))
        parts.append(influence(clean, logits.view(len(part), *clean.shape)))
    return torch.cat(parts)


def scaled_to_eps(
    encoder: FrozenEncoder,
    noise: Tensor,
    influences: Tensor,
    pairs: list[Pair],
    eps: float,
    *,
    larger: bool = False,
    mean: Mean | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale each noise to the largest scale found at which its influence is below ε.

    Each noise has its own search, and all are judged together. A search keeps a bracket and fits a power law through
    the last two scales, until the influence is between CLOSE · ε and ε: one to five passes over the images. If the
    influence is not monotone in the scale, the search finds one of the crossings of ε.

    Args:
        encoder: at the site.
        noise: [M, ...].
        influences: influence of each noise at scale 1 [M], from `judge`.
        pairs: the images to judge on.
        eps: the influence to stay below.
        larger: allow scales up to LARGEST_SCALE instead of 1.
        mean: takes means over processes that hold other images; None is one process.

    Returns:
        The noises [M, ...] and their influence [M], NaN if no scale was found.
    """
    searches = [_Search(eps, LARGEST_SCALE if larger else 1.0) for _ in noise]
    left, values = list(range(len(noise))), influences.tolist()
    while left:
        for m, value in zip(left, values, strict=True):
            searches[m].take(value)
        left = [m for m in left if not searches[m].done]
        if left:
            scales = noise.new_tensor([searches[m].scale for m in left])
            values = judge(encoder, noise[left] * expand_as_noise(scales, noise), pairs, mean).tolist()
    scales = influences.new_tensor([search.low for search in searches]).to(noise)
    return noise * expand_as_noise(scales, noise), influences.new_tensor([search.influence for search in searches])


@dataclass
class _Search:
    """Search for the scale of one noise: `scale` is judged next; `low` is the best so far, with `influence`."""

    eps: float
    largest: float
    scale: float = 1.0
    low: float = 0.0
    influence: float = math.nan
    done: bool = False
    _high: float = math.inf
    _power: float = 2.0
    _last: tuple[float, float] = (0.0, 0.0)
    _looks: int = 0

    def take(self, influence: float) -> None:
        """Continue from the influence measured at `scale`."""
        scale = self.scale
        if influence < self.eps:
            self.low, self.influence = scale, influence
            self.done = influence >= CLOSE * self.eps or scale >= self.largest
        else:
            self._high = scale
        last_scale, last_influence = self._last
        if influence > 0 and last_influence > 0 and influence != last_influence:
            power = math.log(influence / last_influence) / math.log(scale / last_scale)
            self._power = min(max(power, 0.25), 16.0)
        self._last = scale, influence
        guess = math.nan
        if influence > 0:
            aim = self.eps * (1 + CLOSE) / 2
            guess = scale * (aim / influence) ** (1 / self._power)
        top = min(self._high, 2 * scale, self.largest)
        edge = MARGIN * (top - self.low) if self._high < math.inf else 0.0
        if math.isfinite(guess):
            self.scale = min(max(guess, self.low + edge), top - edge)
        else:
            self.scale = (self.low + top) / 2
        self._looks += 1
        self.done = self.done or self._looks == SEARCHES
