"""What fastnull is measured against: each baseline does the same work as we do, written the way its users write it.

A step of universal synthesis here is: gradient of mean ‖Δlogits‖₂ with respect to one noise [N, D] shared by the
batch, then AdamW. A step is a function without arguments that returns that gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attention import attention_by
from fastnull.encoder import FrozenEncoder
from fastnull.finetune.controls import CleanOnly
from fastnull.ops import AdamWState, adamw_step, descent_gate
from fastnull.synthesis.solvers import shared_gradient
from fastnull.vit import split
from fastnull.vit.base import SplitViT

Step = Callable[[], Tensor]

LR = 0.1


def in_dtype(model: nn.Module, dtype: torch.dtype, *, trainable: bool) -> SplitViT:
    """A copy of the model in a dtype and eval mode, with or without weight gradients."""
    return split(copy.deepcopy(model).to(dtype).eval().requires_grad_(trainable))


def published_step(model: nn.Module, images: Tensor, start: Tensor, dtype: torch.dtype) -> Step:
    """The published loop, from its description: eval mode, weights not frozen, clean logits anew in each step.

    So each step computes the patch embedding twice, a second forward, and weight gradients that nobody reads, which
    pile up. Published is float32; in another dtype the whole model is.

    Args:
        model: takes pixels [B, C, H, W].
        images: [B, C, H, W].
        start: noise [N, D] in float32.
    """
    vit = in_dtype(model, dtype, trainable=True)
    images = images.to(dtype)
    noise = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([noise], lr=LR, weight_decay=0.01)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            clean = vit.model(images)
        noisy = vit.logits((vit.embed(images, "patch") + noise).to(dtype), "patch")
        (noisy - clean).float().norm(dim=1).mean().backward()
        gradient = noise.grad.clone()
        optimizer.step()
        return gradient

    return step


def frozen_step(
    model: nn.Module,
    images: Tensor,
    start: Tensor,
    dtype: torch.dtype,
    *,
    compiled: str | None = None,
    attention: str = "",
) -> Step:
    """The careful user's loop: weights frozen, clean tokens and logits computed once, input gradient by autograd.

    Arguments as for `published_step`, and:
        compiled: a mode of torch.compile, through which the encoder then goes.
        attention: name of torch's implementation; "" leaves the choice to torch.
    """
    vit = in_dtype(model, dtype, trainable=False)

    def logits(tokens: Tensor) -> Tensor:
        return vit.logits(tokens, "patch")

    encode: Callable[[Tensor], Tensor] = torch.compile(logits, mode=compiled) if compiled else logits
    with torch.no_grad():
        tokens = vit.embed(images.to(dtype), "patch")
        clean = vit.logits(tokens, "patch")
    noise = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([noise], lr=LR, weight_decay=0.0)

    def step() -> Tensor:
        with attention_by(attention):
            noisy = encode((tokens + noise).to(dtype))
        loss = (noisy - clean).float().norm(dim=1).mean()
        (gradient,) = torch.autograd.grad(loss, noise)
        noise.grad = gradient
        optimizer.step()
        return gradient

    return step


def fastnull_step(encoder: FrozenEncoder, images: Tensor, start: Tensor) -> Step:
    """Ours, of the pieces that `synthesize` runs."""
    tokens = encoder.embed(images)
    clean = encoder(tokens)
    noise = start.clone().unsqueeze(0)
    state = AdamWState.zeros(noise)

    def step() -> Tensor:
        _, seen, gradient = shared_gradient(encoder, tokens, clean, noise, "l2")
        adamw_step(noise, gradient, state, descent_gate(seen, 0.0), lr=LR)
        return gradient[0]

    return step


def block_products(model: nn.Module, batch: int, dtype: torch.dtype) -> Callable[[int], None]:
    """The four linears' products alone, forward and input gradient, of all blocks: no bias, no rest."""
    parts = in_dtype(model, dtype, trainable=False).parts()
    prefix, positions = parts.positions()
    M = batch * (len(prefix) + len(positions))
    weights = [[linear.weight for linear in (b.qkv, b.proj, b.fc1, b.fc2)] for b in parts.blocks]
    sizes = {size for block in weights for weight in block for size in weight.shape}
    device = parts.projection.weight.device
    source = torch.Generator().manual_seed(0)
    inputs = {size: torch.randn(M, size, generator=source).to(device, dtype) for size in sizes}
    outputs = {size: torch.empty_like(x) for size, x in inputs.items()}

    @torch.no_grad()
    def run(index: int) -> None:
        for block in weights:
            for weight in block:  # [out, in]
                torch.mm(inputs[weight.shape[1]], weight.t(), out=outputs[weight.shape[0]])
        for block in reversed(weights):
            for weight in reversed(block):
                torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])

    return run


def published_synthesis(
    model: nn.Module, batches: list[Tensor], start: Tensor, dtype: torch.dtype, eps: float, steps: int
) -> tuple[Tensor, int]:
    """The published loop to its end: stops where the current minibatch's influence is below ε, tested before the
    update. Returns the noise [N, D] and the updates made."""
    vit = in_dtype(model, dtype, trainable=True)
    noise = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([noise], lr=LR, weight_decay=0.0)
    for step in range(steps):
        images = batches[step % len(batches)].to(dtype)
        optimizer.zero_grad()
        with torch.no_grad():
            clean = vit.model(images)
        noisy = vit.logits((vit.embed(images, "patch") + noise).to(dtype), "patch")
        gap = clean.float().softmax(-1) - noisy.detach().float().softmax(-1)
        if gap.square().sum(-1).mean() < eps:
            return noise.detach(), step
        (noisy - clean).float().norm(dim=1).mean().backward()
        optimizer.step()
    return noise.detach(), steps


def unfold_project(noise: Tensor, basis: Tensor, patch: int) -> Tensor:
    """noise − R Rᵀ noise, patch by patch, in plain torch; basis R [C·p·p, n], noise [B, C, H, W]."""
    columns = F.unfold(noise, patch, stride=patch)  # [B, C·p·p, patches]
    return noise - F.fold(basis @ (basis.T @ columns), noise.shape[2:], patch, stride=patch)


class TwoCleanViews(CleanOnly):
    """What a finetuning step costs without synthesis: two clean views in one pass, as an augmentation that adds
    nothing."""

    def loss(self, images: Tensor, labels: Tensor, criterion: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """criterion(clean) + criterion(clean again), and the logits [B, K]."""
        first, second = self.model(torch.cat([images, images])).chunk(2)
        return criterion(first, labels) + criterion(second, labels), first


def compile_problem() -> str:
    """Why torch.compile cannot run here; empty where it can."""
    try:
        compiled: Any = torch.compile(lambda x: (x * 2).sin())
        compiled(torch.ones(8))
    except Exception as error:  # whatever stops the compiler is a reason to go without it
        return f"torch.compile does not run here: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return ""
