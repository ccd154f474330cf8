"""Free noise: boundary noise in pixels along gradients that the training computes anyway.

A training step sees new images without noise, and the images of the step before with noise. The backward pass of the
new images also gives the gradient of their loss with respect to the pixels, for one more small product. In the next
step their noise goes along the sign of that gradient, from a random start. So the noise costs no pass of its own.

All lengths have a common factor, the strength. It is raised while the mean influence of the noise is below ε, and
lowered above: ε limits the mean over the images, as in the definition of the approximate nullspace.

Source: "free" adversarial training (Shafahi et al. 2019) reuses the gradient of the training by repeating every batch,
inside a ball of fixed radius. The delay by one step and the strength are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastnull.checks import check_finite
from fastnull.rng import carried
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.solvers import expand_as_noise, valid_noise
from fastnull.synthesis.starts import draw_start, step_source

FIRST_STRENGTH = 0.25
"""The strength in the first step: a model that is not robust yet has a large influence at full lengths."""
RATE = 0.1
"""Largest change of the logarithm of the strength in a step."""


@dataclass(frozen=True)
class Visited:
    """Images of a step whose noisy view is due in the next one.

    Attributes:
        rows: positions in the whole batch [B], on the CPU.
        images: without noise [B, C, H, W]; a leaf with a gradient after the backward pass.
        labels: classes [B] or probabilities [B, K].
        logits: of the images without noise [B, K].
        influence: mean influence of the noise of the images of the step before; NaN without any.
        direction: sign of the gradient with respect to the images [B, C, H, W] int8; None: still in `images.grad`.
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    logits: Tensor
    influence: Tensor
    direction: Tensor | None = None

    def settled(self) -> Visited | None:
        """The same with its direction and without the gradient; None if there was no backward pass."""
        if self.direction is not None:
            return self
        if self.images.grad is None:
            return None
        # scaled gradients in float16 can be Inf - Inf
        direction = self.images.grad.sign().nan_to_num(0).to(torch.int8)
        return replace(self, images=self.images.detach(), direction=direction)

    def at(self, rows: Tensor) -> Visited:
        """Those at the given rows of the whole batch."""
        if torch.equal(rows, self.rows):
            return self
        chosen = torch.isin(self.rows, rows).nonzero().flatten()
        return self._with(lambda value: value[carried(chosen, value.device)])

    def to(self, device: torch.device) -> Visited:
        """The same on another device; rows stay on the CPU."""
        return replace(self._with(lambda value: carried(value, device)), rows=self.rows)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Visited:
        return replace(self, **{name: change(getattr(self, name)) for name in _OF_IMAGES})


class FreeNoise:
    """The noise of a training from step to step.

    Args:
        config: limits, step_size, ranges, contrast, seed, and ε for the mean influence.

    Attributes:
        strength: factor on all lengths [], at most 1.
    """

    def __init__(self, config: SynthesisConfig) -> None:
        self._config = config
        self.strength = torch.tensor(FIRST_STRENGTH)
        self._step: int | None = None
        self._before: list[Visited] = []
        self._now: list[Visited] = []
        self._warned = False

    def begin(self, step: int, device: torch.device, mean: Callable[[Tensor], Tensor]) -> None:
        """Begin a part of a step: if it is the first, the images of the step before become due, and the strength
        follows the influence of the noise in that step.

        Args:
            step: number of the step.
            device: of the new images.
            mean: mean of a number [] over the processes of the training.
        """
        if step == self._step:
            return
        before = _settled(self._now)
        if len(before) < len(self._now) and not self._warned:
            warnings.warn(
                "fastnull: no gradient reached the images of the step before, so they have no noisy view: the loss had "
                "no backward pass, or the model detaches its input",
                stacklevel=4,
            )
            self._warned = True
        self._step, self._before, self._now = step, before, []
        self.strength = self.strength.to(device)
        if self._before:
            found = mean(torch.stack([visited.influence.to(device) for visited in self._before]).mean())
            error = ((self._config.eps - found) / self._config.eps).clamp(-1, 1)
            raised = (self.strength * (RATE * error).exp()).clamp(max=1)
            self.strength = torch.where(found.isfinite(), raised, self.strength)

    def due(self, rows: Tensor, device: torch.device) -> tuple[Visited, Tensor] | None:
        """Images of the step before and their noise [n, C, H, W]; None without any.

        Args:
            rows: of the new images in the whole batch [B].
            device: of the new images.
        """
        parts = [part for part in (visited.at(rows) for visited in self._before) if len(part.rows)]
        if not parts:
            return None
        visited = (parts[0] if len(parts) == 1 else _joined(parts)).to(device)
        images, direction = visited.images, visited.direction
        assert direction is not None
        assert self._step is not None
        source = step_source(self._config.seed, self._step, carried(visited.rows, device))
        start = draw_start(images, self._config, source)
        size = start.step_size
        length = expand_as_noise(size, direction) if isinstance(size, Tensor) and size.ndim else size
        noise = valid_noise(images, self.strength * (start.noise + length * direction))
        return visited, noise.to(images.dtype)

    def keep(self, rows: Tensor, images: Tensor, labels: Tensor, logits: Tensor, influence: Tensor) -> None:
        """Keep the new images of a part, for the next step; see Visited."""
        self._now.append(Visited(rows, images, labels, logits.detach(), influence))

    def state_dict(self) -> dict[str, Any]:
        """State for resuming, on the CPU: the images of the last step with the direction of their noise."""
        visited = [{name: value.cpu() for name, value in vars(part).items()} for part in _settled(self._now)]
        return {"strength": float(self.strength), "visited": visited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`, or one with the images of several processes.

        Raises:
            KeyError, TypeError, ValueError: the state is of another kind.
        """
        strength = torch.tensor(float(state["strength"]))
        check_finite("strength", strength)
        self._now = [Visited(**part) for part in state["visited"]]
        self.strength, self._step, self._before = strength, None, []


def _settled(visited: Sequence[Visited]) -> list[Visited]:
    return [part for part in (part.settled() for part in visited) if part is not None]


def _joined(parts: Sequence[Visited]) -> Visited:
    """Parts of a step in the order of their rows, where a resumed run splits its batch in another way."""
    values = {name: torch.cat([getattr(part, name) for part in parts]) for name in _OF_IMAGES}
    order = values["rows"].argsort()
    return replace(parts[0], **{name: value[carried(order, value.device)] for name, value in values.items()})


_OF_IMAGES = ("rows", "images", "labels", "logits", "direction")
