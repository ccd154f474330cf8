"""The controls of nullspace augmentation: clean images alone, and adversarial training.

Both have NullspaceAugment's interface, so a training loop calls `refresh` and `loss` whatever the augmentation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastnull.augment import NullspaceAugment
from fastnull.rng import generator

Criterion = Callable[[Tensor, Tensor], Tensor]


class Stopwatch:
    """Adds up the time spent inside `with watch:`; on CUDA by events, so that nothing waits until `seconds` is read."""

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
    """NullspaceAugment that measures the synthesis inside its training steps; `watch` is to be set before the first."""

    watch: Stopwatch

    def draw(self, tokens: Tensor) -> Tensor:
        with self.watch:
            return super().draw(tokens)


class CleanOnly:
    """No augmentation: criterion(clean)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step = 0
        self.stats: dict[str, Tensor] = {}

    def refresh(self, batches: Any, **_: Any) -> None:
        """Nothing to learn."""

    def loss(self, images: Tensor, labels: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """The loss with its graph and the logits [B, K]."""
        logits = self.model(images)
        return criterion(logits, labels), logits

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: every draw is a function of seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class AdversarialTraining(CleanOnly):
    """criterion(clean) + criterion(PGD), in one pass over both views (Madry et al. 2018, with the clean loss that the
    published loop adds).

    Args:
        model: takes pixels in [0, 1].
        eps, step_size: of PGD in the L-infinity norm, in pixels; steps: of it, from a random start.
        seed: with `step` the key of the start.
        watch: measures the attack.
    """

    def __init__(
        self, model: nn.Module, *, eps: float, steps: int, step_size: float, seed: int, watch: Stopwatch
    ) -> None:
        super().__init__(model)
        self.eps, self.steps, self.step_size, self.seed, self.watch = eps, steps, step_size, seed, watch

    def loss(self, images: Tensor, labels: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """The loss with its graph and the clean view's logits [B, K]."""
        from fastnull.robustness.attacks.gradient import pgd

        with self.watch:
            attacked = pgd(
                self.model,
                images,
                labels,
                self.eps,
                steps=self.steps,
                step_size=self.step_size,
                generator=generator(self.seed, self.step, 1),
            )
        self.stats["norm"] = torch.linalg.vector_norm((attacked - images).flatten(1), dim=1).mean()
        clean, noisy = self.model(torch.cat([images, attacked])).chunk(2)
        return criterion(clean, labels) + criterion(noisy, labels), clean
