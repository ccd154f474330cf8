"""The step rules of noise synthesis, on tensors at the site; no loops over batches, no host sync.

Everywhere `tokens` is the site's tensor without noise [B, ...] and `noise` has at least float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastnull.encoder import FrozenEncoder
from fastnull.objective import distance, influence

if TYPE_CHECKING:
    from fastnull.synthesis import SynthesisConfig


def boundary_noise(
    encoder: FrozenEncoder, tokens: Tensor, start: Tensor, config: SynthesisConfig
) -> tuple[Tensor, Tensor]:
    """Drive one noise an image to influence = ε: against the gradient where it is above, along it where below.

    Args:
        encoder: at the site.
        tokens: at the site, without noise [B, ...].
        start: noise to start from [B, ...].
        config: eps, objective, steps and step_size are used.

    Returns:
        the noise [B, ...] and the influence before the last step [B]. No host sync.
    """
    clean = encoder(tokens)  # [B, K]
    pixels = encoder.site == "pixels"
    noise = valid_noise(tokens, start) if pixels else start
    step_size = config.step_size or (4 / 255 if pixels else 0.1 * norms(start).mean())
    seen = torch.zeros(len(tokens), device=tokens.device)
    for _ in range(config.steps or 3):
        seen, gradient = distance_gradient(encoder, tokens, noise, clean, config.objective)
        direction = gradient.sign() if pixels else gradient / spread(norms(gradient).clamp_min(1e-30), gradient)
        towards = torch.where(seen < config.eps, step_size, -step_size)  # [B]
        noise = noise + spread(towards, noise) * direction
        if pixels:
            noise = valid_noise(tokens, noise)
    return noise, seen


def optimized_noise(
    encoder: FrozenEncoder, tokens: Tensor, start: Tensor, config: SynthesisConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Move one noise an image by AdamW until its own influence is below ε.

    Args:
        encoder: at the site.
        tokens: at the site, without noise [B, ...].
        start: noise to start from [B, ...].
        config: eps, objective, log_norm_weight, lr, weight_decay, steps and schedule are used.

    Returns:
        the noise [B, ...], the influence before the last step [B] and the updates each image got [B].
    """
    clean = encoder(tokens)  # [B, K]
    pixels = encoder.site == "pixels"
    noise = valid_noise(tokens, start) if pixels else start.clone()
    optimizer = AdamW(noise, config)
    steps = config.steps or 30
    taken = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    seen = torch.zeros(len(tokens), device=tokens.device)
    for step in range(steps):
        seen, gradient = distance_gradient(encoder, tokens, noise, clean, config.objective)
        active = seen >= config.eps  # [B]
        gradient = gradient - log_norm_gradient(noise, config.log_norm_weight)
        noise = optimizer.step(noise, gradient, learning_rate(config, step, steps), active)
        if pixels:
            noise = valid_noise(tokens, noise)
        taken += active
    return noise, seen, taken


def perturb(encoder: FrozenEncoder, tokens: Tensor, noise: Tensor) -> Tensor:
    """Tokens with the noise on them; pixels stay in [0, 1]."""
    noisy = (tokens + noise).to(tokens.dtype)
    return noisy.clamp(0, 1) if encoder.site == "pixels" else noisy


def batch_gradient(
    encoder: FrozenEncoder, tokens: Tensor, clean: Tensor, noise: Tensor, objective: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean distance, mean influence, and the gradient of the mean distance for one noise shared by the batch."""
    found: list[Tensor] = []

    def cotangent(logits: Tensor) -> Tensor:
        lengths, gradient = distance(clean, logits, objective)
        found.extend((lengths.mean(), influence(clean, logits).mean()))
        return gradient / len(gradient)

    noisy = perturb(encoder, tokens, noise)
    if encoder.site == "pixels":
        _, gradient = encoder.input_gradient(noisy, cotangent)
        # a pixel at the border of [0, 1] does not move with the noise
        gradient = (gradient * (noisy == tokens + noise)).sum(0)
    else:
        _, gradient = encoder.input_gradient(noisy, cotangent, sum_batch=True)
    return found[0], found[1], gradient.to(noise.dtype)


def distance_gradient(
    encoder: FrozenEncoder, tokens: Tensor, noise: Tensor, clean: Tensor, objective: str
) -> tuple[Tensor, Tensor]:
    """Influence [B] and the gradient [B, ...] of each image's distance with respect to its own noise."""
    seen: list[Tensor] = []

    def cotangent(logits: Tensor) -> Tensor:
        seen.append(influence(clean, logits))
        return distance(clean, logits, objective)[1]

    _, gradient = encoder.input_gradient(perturb(encoder, tokens, noise), cotangent)
    return seen[0], gradient.to(noise.dtype)


class AdamW:
    """AdamW on M noises at once, each with its own count of steps; the equations of torch.optim.AdamW."""

    def __init__(self, noise: Tensor, config: SynthesisConfig, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.weight_decay, self.beta1, self.beta2 = config.weight_decay, beta1, beta2
        self.mean, self.square = torch.zeros_like(noise), torch.zeros_like(noise)
        self.count = torch.zeros(len(noise), dtype=noise.dtype, device=noise.device)

    def step(self, noise: Tensor, gradient: Tensor, lr: float, active: Tensor) -> Tensor:
        """Return the noise after one step where `active` [M], unchanged elsewhere."""
        self.count += active
        mean = torch.lerp(self.mean, gradient, 1 - self.beta1)
        square = torch.lerp(self.square, gradient.square(), 1 - self.beta2)
        correct1 = spread(1 - self.beta1**self.count, noise)
        correct2 = spread(1 - self.beta2**self.count, noise)
        moved = noise * (1 - lr * self.weight_decay) - lr * (mean / correct1) / ((square / correct2).sqrt() + 1e-8)
        on = spread(active, noise)
        self.mean = torch.where(on, mean, self.mean)
        self.square = torch.where(on, square, self.square)
        return torch.where(on, moved, noise)


def learning_rate(config: SynthesisConfig, step: int, period: int) -> float:
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * step / period)) / 2


def log_norm_gradient(noise: Tensor, weight: float) -> Tensor | float:
    """Gradient of weight · log‖v‖ for each noise; v/‖v‖² times the weight."""
    if weight == 0:
        return 0.0
    return weight * noise / spread(norms(noise).square().clamp_min(1e-30), noise)


def valid_noise(images: Tensor, noise: Tensor) -> Tensor:
    """The noise cut so that images + noise are pixels in [0, 1]."""
    return (images + noise).clamp(0, 1) - images


def norms(noise: Tensor) -> Tensor:
    """L2 norm of each noise; [M]."""
    return torch.linalg.vector_norm(noise.flatten(1), dim=1)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """[M] → [M, 1, 1, ...], to multiply noises."""
    return values.view(-1, *[1] * (like.ndim - 1))
