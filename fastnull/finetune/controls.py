"""Controls for nullspace augmentation: clean images only, adversarial training (Madry) and TRADES.

They have the interface of NullspaceAugment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull.augment import NullspaceAugment
from fastnull.rng import Place, carried, fraction_of, generator
from fastnull.synthesis.free import Visited
from fastnull.vit import frozen, unwrap

Criterion = Callable[[Tensor, Tensor], Tensor]


class Stopwatch:
    """Total time spent inside `with watch:`; on CUDA measured by events, which do not synchronise until `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._total = 0.0
        self._begin: Any = None
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> Stopwatch:
        self._begin = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if self._cuda:
            self._events.append((self._begin, end))
        else:
            self._total += end - self._begin

    def seconds(self) -> float:
        """The sum so far."""
        for begin, end in self._events:
            end.synchronize()
            self._total += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._total

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TimedAugment(NullspaceAugment):
    """NullspaceAugment that measures the time of synthesis; set `watch` before the first step."""

    watch: Stopwatch

    def draw(self, tokens: Tensor) -> Tensor:
        with self.watch:
            return super().draw(tokens)

    def _due(self, rows: Tensor, device: torch.device) -> tuple[Visited, Tensor] | None:
        with self.watch:
            return super()._due(rows, device)


class CleanOnly:
    """No augmentation: criterion(clean)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step = 0
        self._place: Place | None = None
        self.stats: dict[str, Tensor] = {}

    def at(self, step: int, place: Place | None = None) -> CleanOnly:
        """As NullspaceAugment.at."""
        self.step, self._place = step, place
        return self

    def refresh(self, batches: Any, **_: Any) -> None:
        """Does nothing."""

    def loss(self, images: Tensor, labels: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """The loss with its graph and the logits [B, K]."""
        logits = self.model(images)
        return criterion(logits, labels), logits

    def state_dict(self) -> dict[str, Any]:
        """Empty: random numbers depend only on seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing."""


class AdversarialTraining(CleanOnly):
    """criterion(clean) + criterion(PGD), in one pass over both views (Madry et al. 2018, with the clean loss that the
    published loop adds).

    Args:
        model: takes pixels in [0, 1].
        eps, steps, step_size: of PGD in the L-infinity norm, in pixels, from a random start.
        seed: (seed, step) is the key of the start.
        watch: measures the attack.
        fraction: 0: a clean and an attacked view per image; else one view, attacked for that fraction of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        steps: int,
        step_size: float,
        seed: int,
        watch: Stopwatch,
        fraction: float = 0.0,
    ) -> None:
        super().__init__(model)
        self.eps, self.steps, self.step_size, self.seed, self.watch = eps, steps, step_size, seed, watch
        self.fraction = fraction

    def loss(self, images: Tensor, labels: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """The loss with its graph and the logits [B, K] of the clean view, or of the only view."""
        if self.fraction:
            logits = self.model(self._one_view(images, labels))
            return criterion(logits, labels), logits
        with self.watch:
            attacked = self.attack(images, labels, self._place)
        clean, noisy = self.model(torch.cat([images, attacked])).chunk(2)
        return criterion(clean, labels) + criterion(noisy, labels), clean

    def _one_view(self, images: Tensor, labels: Tensor) -> Tensor:
        """The images, a fraction of them attacked."""
        place = self._place or Place(torch.arange(len(images)), len(images))
        positions, place = fraction_of(place, self.fraction, self.step)
        positions = carried(positions, images.device)
        with self.watch:
            attacked = self.attack(images[positions], labels[positions], place)
        return images.index_copy(0, positions, attacked)

    def attack(self, images: Tensor, labels: Tensor, place: Place | None = None) -> Tensor:
        """PGD in eval mode from a random start, against classes [B] or soft labels [B, K]; fills `stats`."""
        from fastnull.robustness.attacks.gradient import pgd

        attacked = pgd(
            # DDP expects a backward pass of the weights after each forward pass
            unwrap(self.model),
            images,
            labels,
            self.eps,
            steps=self.steps,
            step_size=self.step_size,
            seed=generator(self.seed, self.step, 1).initial_seed(),
            indices=None if place is None else carried(place.rows, images.device),
        )
        self.stats["norm"] = torch.linalg.vector_norm((attacked - images).flatten(1), dim=1).mean()
        return attacked


class Trades(AdversarialTraining):
    """criterion(clean) + beta · KL(clean ‖ attacked), the attack raising that divergence (Zhang et al. 2019, eq. 5).

    The attack starts at a uniform point of the ball, as in `AdversarialTraining`; the original starts within 0.001.

    Args:
        model, eps, step_size, steps, seed, watch: as in AdversarialTraining.
        beta: weight of the divergence, 6 in most published results; 1 / λ of the paper.
    """

    def __init__(self, model: nn.Module, *, beta: float, **attack: Any) -> None:
        super().__init__(model, **attack)
        self.beta = beta

    def loss(self, images: Tensor, labels: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """The loss with its graph and the clean view's logits [B, K]. The attack does not use the labels."""
        with self.watch:
            # with soft labels the cross entropy is the divergence plus a constant, so their gradients are equal
            attacked = self.attack(images, self._probabilities(images), self._place)
        clean, noisy = self.model(torch.cat([images, attacked])).chunk(2)
        divergence = F.kl_div(
            noisy.float().log_softmax(1), clean.float().log_softmax(1), reduction="batchmean", log_target=True
        )
        return criterion(clean, labels) + self.beta * divergence, clean

    @torch.no_grad()
    def _probabilities(self, images: Tensor) -> Tensor:
        model = unwrap(self.model)
        with frozen(model):
            return model(images).float().softmax(1)  # [B, K]
