"""The step rules of noise synthesis, on tensors at the site. They have no loop over batches and no host sync.

`tokens` is always the tensor at the site without noise [B, ...]; `noise` is float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnull.encoder.frozen import FrozenEncoder
from fastnull.ops import (
    AdamWState,
    adamw_step,
    boundary_gate,
    descent_gate,
    noise_objective,
    normalized_step,
    sign_step,
)
from fastnull.ops.common import no_autocast
from fastnull.synthesis.config import SynthesisConfig
from fastnull.synthesis.objective import PREDICTION, prediction_gradient, probability_change
from fastnull.synthesis.replay import Replay, use_graph

TENTH = 0.1
"""Of the start's norm: a boundary step at the token sites."""


def own_noise(
    encoder: FrozenEncoder,
    tokens: Tensor,
    clean: Tensor,
    start: Tensor,
    config: SynthesisConfig,
    step_size: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One noise per image, by config.mode.

    `boundary` drives the influence to ε: steps of a given length against the gradient if it is above, along it if it is
    below. `per_image` moves the noise by AdamW until its influence is below ε.

    Args:
        encoder: at the site.
        tokens: at the site, without noise [B, ...].
        clean: logits without noise [B, K].
        start: noise to start from [B, ...].
        config: eps, objective and steps are used; per_image: weight_decay, schedule and log_norm_weight too.
        step_size: of the first step, [] or [B]; None is `first_step_size`.

    Returns:
        The noise [B, ...], the influence before the last step [B] and the number of updates [B].
    """
    pixels, steps = encoder.site == "pixels", config.steps
    assert steps is not None, f"mode {config.mode!r} has no fixed number of steps"
    tokens, start = tokens.contiguous(), start.contiguous()  # once, since the steps need dense memory
    with no_autocast(tokens.device):
        noise = valid_noise(tokens, start) if pixels else start.clone()
        state = None if config.mode == "boundary" else AdamWState.zeros(noise)
        size = first_step_size(start.shape[1:], config) if step_size is None else step_size
        for step in range(steps):
            influence, gradient = own_gradients(encoder, tokens, noise, clean, config.objective)
            if state is None:
                move = sign_step if pixels else normalized_step
                move(noise, gradient, boundary_gate(influence, config.eps), lr=size)
            else:
                gradient = gradient - log_norm_gradient(noise, config.log_norm_weight)
                gate, lr = descent_gate(influence, config.eps), size * decay(config, step, steps)
                adamw_step(noise, gradient, state, gate, lr=lr, weight_decay=config.weight_decay)
            if pixels:
                noise = valid_noise(tokens, noise)
    return noise, influence, torch.full_like(influence, steps, dtype=torch.int64) if state is None else state.steps


def replayed_noise(encoder: FrozenEncoder, config: SynthesisConfig) -> Replay:
    """`own_noise` as a function of tokens, clean logits, start and perhaps step size; config.graph: in a CUDA graph."""

    def solve(tokens: Tensor, clean: Tensor, start: Tensor, *size: Tensor) -> tuple[Tensor, ...]:
        return own_noise(encoder, tokens, clean, start, config, *size)

    return Replay(solve, use_graph(config.graph, encoder.device, encoder.backend), buffers=encoder.buffers)


def first_step_size(shape: Sequence[int], config: SynthesisConfig) -> float:
    """The highest learning rate, or in mode boundary the length of a step: step_size, or a tenth of the norm that a
    start of this shape has in the mean. It is not measured, because the images at hand can be a part of the batch."""
    if config.mode == "per_image":
        return config.rate
    strength = config.limit * (1 - config.limit_range / 2)
    return config.step_size or TENTH * strength * math.sqrt(math.prod(shape) / 3)


def perturb(encoder: FrozenEncoder, tokens: Tensor, noise: Tensor) -> Tensor:
    """Tokens [B, ...] plus noise [B, ...] or [M, 1, ...]; pixels are clamped to [0, 1].

    Raises:
        ValueError: noise of another shape than the tensor at the site.
    """
    if noise.shape[1 - tokens.ndim :] != tokens.shape[1:]:  # the noise of one token would broadcast to all
        raise ValueError(
            f"noise must have shape [..., {', '.join(map(str, tokens.shape[1:]))}], that of the tensor at "
            f"site {encoder.site!r}; got {list(noise.shape)}"
        )
    noisy = (tokens + noise).to(tokens.dtype)
    return noisy.clamp(0, 1) if encoder.site == "pixels" else noisy


def shared_gradient(
    encoder: FrozenEncoder, tokens: Tensor, clean: Tensor, noise: Tensor, objective: str
) -> tuple[Tensor, Tensor, Tensor]:
    """For noises [M, ...] that all images of a batch [B, ...] share, in one pass: mean distance [M], mean influence
    [M], and the gradient of the mean distance [M, ...]."""
    M, B = len(noise), len(tokens)
    rows = clean.repeat(M, 1)  # [M·B, K]

    def cotangent(logits: Tensor, images: slice) -> tuple[Tensor, Tensor, Tensor]:
        if len(logits) == M * B:  # all images at once, as on a GPU: the objective takes the mean for each noise
            judged = noise_objective(rows[images], logits, objective, groups=M, batch=B)
            return judged.cotangent, judged.mean_loss, judged.mean_influence
        judged = noise_objective(rows[images], logits, objective, batch=B)
        return judged.cotangent, judged.loss, judged.influence

    noisy = perturb(encoder, tokens, noise.unsqueeze(1))  # [M, B, ...]
    pixels = encoder.site == "pixels"
    sum_every = None if pixels else B
    _, gradient, loss, influence = encoder.input_gradient(
        noisy.flatten(0, 1), cotangent, by_image=True, sum_every=sum_every, has_aux=True
    )
    if pixels:
        gradient = (gradient.view(noisy.shape) * _moves(noisy, tokens, noise)).sum(1, dtype=noise.dtype)
    if len(loss) > M:  # per image, since the batch went through in parts
        loss, influence = loss.view(M, B).mean(1), influence.view(M, B).mean(1)
    return loss, influence, gradient.to(noise.dtype)


def shared_rows(encoder: FrozenEncoder, tokens: Tensor, clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """For noises [M, ...] that all images of a batch [B, ...] share, in one pass: the change of each image's
    probabilities [M, B] and its gradient [M, B, ...]."""
    rows = clean.repeat(len(noise), 1)  # [M·B, K]

    def cotangent(logits: Tensor, images: slice) -> tuple[Tensor, Tensor]:
        change, direction = probability_change(rows[images], logits)
        return direction, change

    noisy = perturb(encoder, tokens, noise.unsqueeze(1))  # [M, B, ...]
    _, gradient, changes = encoder.input_gradient(noisy.flatten(0, 1), cotangent, by_image=True, has_aux=True)
    gradient = gradient.view(noisy.shape)
    if encoder.site == "pixels":
        gradient = gradient * _moves(noisy, tokens, noise)
    return changes.view(noisy.shape[:2]).to(noise.dtype), gradient.to(noise.dtype)


def _moves(noisy: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
    """Mask of the pixels [M, B, ...] that move with the noise: those not clamped to [0, 1]."""
    return noisy == tokens + noise.unsqueeze(1)


def own_gradients(
    encoder: FrozenEncoder, tokens: Tensor, noise: Tensor, clean: Tensor, objective: str
) -> tuple[Tensor, Tensor]:
    """Influence [B], and the gradient [B, ...] of each image's objective with respect to its noise."""

    def cotangent(logits: Tensor, images: slice) -> tuple[Tensor, Tensor]:
        if objective == PREDICTION:
            return prediction_gradient(clean[images], logits)
        judged = noise_objective(clean[images], logits, objective, reduction="none")
        return judged.cotangent, judged.influence

    noisy = perturb(encoder, tokens, noise)
    _, gradient, influence = encoder.input_gradient(noisy, cotangent, by_image=True, has_aux=True)
    return influence, gradient


def decay(config: SynthesisConfig, step: int, period: int) -> float:
    """Factor on AdamW's lr or Gauss-Newton's radius: 1, or a cosine that falls from 1 to 0 over the period."""
    return 1.0 if config.schedule == "constant" else (1 + math.cos(math.pi * step / period)) / 2


def log_norm_gradient(noise: Tensor, weight: float) -> Tensor | float:
    """Gradient of weight · log‖v‖ for each noise v: weight · v/‖v‖²."""
    if weight == 0:
        return 0.0
    inverse = expand_as_noise(1 / norms(noise).clamp_min(1e-30), noise)
    return weight * (noise * inverse) * inverse  # not the square of the norm, which underflows


def valid_noise(images: Tensor, noise: Tensor) -> Tensor:
    """The noise cut so that images + noise are pixels in [0, 1]."""
    return (images + noise).clamp(0, 1) - images


def norms(noise: Tensor) -> Tensor:
    """L2 norm of each noise [M]; summed in float64, where squares of float32 neither underflow nor overflow."""
    return torch.linalg.vector_norm(noise.flatten(1), dim=1, dtype=torch.float64).to(noise.dtype)


def expand_as_noise(values: Tensor, like: Tensor) -> Tensor:
    """[M] → [M, 1, 1, ...], to multiply noises."""
    return values.view(-1, *[1] * (like.ndim - 1))
