"""Common parts of the attacks: the model under attack, its checked logits and loss, and the geometry of the balls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnull.checks import check_choice, check_images, check_labels, check_number, values_are_trusted
from fastnull.rng import KeyedRandom, carried
from fastnull.vit import frozen

NORMS = ("linf", "l2")

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], labels) → loss per image [B], which attacks maximise."""


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """Dtype of the first floating-point parameter; None if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def model_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits [B, K] in float32 or better; `.logits` of a Hugging Face output is unwrapped.

    Images are cast to the model's dtype, so a bfloat16 model can be attacked in float32 steps.

    Raises:
        TypeError: the model returns neither a tensor nor something with `.logits`.
        ValueError: not [B, K].
    """
    output: Any = model(images.to(model_dtype(model) or images.dtype))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits [B, K] or an output with .logits; got {type(output).__name__}")
    if logits.ndim != 2 or logits.shape[0] != images.shape[0]:
        raise ValueError(f"model must return logits [{images.shape[0]}, K]; got shape {list(logits.shape)}")
    return logits if logits.dtype == torch.float64 else logits.float()


def check_logits(broken: Tensor) -> None:
    """Raise ValueError if the flag of `is_broken` is set; waits for the device."""
    if not values_are_trusted() and bool(broken):
        raise ValueError("the model returned NaN or +Inf logits")


def is_broken(logits: Tensor) -> Tensor:
    """Flag on the device: NaN or +Inf among the logits. -Inf is allowed: it masks classes out."""
    return ~(logits < math.inf).all()


@contextmanager
def under_attack(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Freeze the model and enable gradients, also inside no_grad and inference_mode; restore everything afterwards."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad(), frozen(model):
        yield


class Victim:
    """A batch and the model under attack. Create it inside `under_attack`.

    Args:
        model: pixels in [0, 1] → logits.
        images, labels: clean pixels [B, C, H, W]; true classes [B] (or soft [B, K]), or targets where `targeted`.
        targeted: the loss is negated and success means reaching the label.
        criterion: loss per image; None: the cross entropy.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, targeted: bool = False,
        criterion: Criterion | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.dtype = images.dtype
        # float32: 1/255 is one bf16 step near 1. Copies, because inference tensors cannot be differentiated
        self.clean = images.detach().to(torch.promote_types(images.dtype, torch.float32), copy=True)
        self.labels = labels
        if isinstance(labels, Tensor):
            dtype = labels.dtype if labels.is_floating_point() else torch.int64
            self.labels = labels.detach().to(images.device, dtype, copy=True)
        self.targeted = targeted
        self.criterion = criterion
        self._checked = False
        self._broken = torch.zeros((), dtype=torch.bool, device=images.device)
        self._steep = torch.zeros_like(self._broken)

    def logits(self, images: Tensor) -> Tensor:
        """[B, K]. The first call checks labels and logits; later ones record NaN without synchronising."""
        logits = model_logits(self.model, images)
        broken = is_broken(logits.detach())
        if not self._checked:
            check_labels(self.labels, logits.shape[1], len(self.clean))
            check_logits(broken)
            self._checked = True
        self._broken |= broken
        return logits

    def loss(self, logits: Tensor) -> Tensor:
        """Loss per image [B], which the attack maximises."""
        if self.criterion is None:
            loss = F.cross_entropy(logits, self.labels, reduction="none")
        else:
            loss = self.criterion(logits, self.labels)
            if loss.shape != logits.shape[:1]:
                raise ValueError(
                    f"criterion must return one loss per image, [{len(logits)}] (reduction='none'); "
                    f"got shape {list(loss.shape)}"
                )
        return -loss if self.targeted else loss

    def success(self, logits: Tensor) -> Tensor:
        """[B] bool: misclassified, or classified as the target."""
        classes = self.labels.argmax(1) if self.labels.ndim == 2 else self.labels
        return (logits.argmax(1) == classes) == self.targeted

    def gradient(self, images: Tensor, loss: Criterion | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the summed loss [B, C, H, W], the loss per image [B] and the logits [B, K], all detached.

        `loss` takes (logits, labels) and replaces the victim's own.
        """
        leaf = images.detach().requires_grad_(True)
        logits = self.logits(leaf)
        values = self.loss(logits) if loss is None else loss(logits, self.labels)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        # only if the logits were finite: NaN logits give NaN gradients too
        self._steep |= ~gradient.isfinite().all() & ~self._broken
        return gradient, values.detach(), logits.detach()

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Success [B] and loss [B] of finished images."""
        logits = self.logits(images)
        return self.success(logits), self.loss(logits)

    def finish(self, images: Tensor) -> Tensor:
        """The attack's result in the caller's dtype, after the check for NaN.

        Raises:
            ValueError: NaN or +Inf logits, or gradients that are not finite.
        """
        if not values_are_trusted() and bool(self._steep):
            raise ValueError("the gradient of the model with respect to the images is not finite (NaN or Inf)")
        check_logits(self._broken)
        return images.detach().to(self.dtype)


class Best:
    """The best attack on each image so far: a success before a failure, then the larger loss, then the later point.

    The cross entropy of a very confident prediction is 0 at every point; the first point would be the clean image.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.success = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.loss = torch.full((len(images),), -math.inf, device=images.device, dtype=images.dtype)

    def offer(self, images: Tensor, success: Tensor, loss: Tensor) -> None:
        """Keep the better result of each image."""
        better = (success & ~self.success) | ((success == self.success) & (loss >= self.loss))
        self.images = torch.where(per_image(better), images, self.images)
        self.success = self.success | success
        self.loss = torch.where(better, loss.to(self.loss.dtype), self.loss)


def check_attack(images: Tensor, eps: float, norm: str) -> None:
    """Raise unless the images are pixels in [0, 1] and eps is in [0, 1] for linf, >= 0 for l2."""
    check_choice("norm", norm, NORMS)
    check_images(images)
    check_number("eps", eps, 0, 1 if norm == "linf" else None)
    if math.isinf(eps):
        raise ValueError(f"eps must be finite; got {eps!r}")


def per_image(values: Tensor) -> Tensor:
    """[B] → [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each image by a power of two so that its largest value is near 1; return these powers too [B, 1, 1, 1].

    In float32, squares of values below 1e-23 are 0 and those above 2e19 are infinite. A power of two does not change
    the mantissa, so results equal those of the unscaled values where these do not over- or underflow.
    """
    largest = tensor.detach().abs().amax((1, 2, 3), keepdim=True)
    reach = -math.log2(torch.finfo(tensor.dtype).tiny)  # 126 in float32: beyond it powers are not normal numbers
    _, exponent = torch.frexp(largest)
    power = torch.exp2((-exponent).clamp(-reach, reach).to(tensor.dtype))
    return tensor * power, power


def length(tensor: Tensor) -> Tensor:
    """Euclidean length of every image [B, 1, 1, 1]."""
    near_one, power = scaled(tensor)
    return _norm(near_one) / power


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent of unit size: the sign, or the gradient divided by its length (0 stays 0)."""
    if norm == "linf":
        return gradient.sign()
    near_one, _ = scaled(gradient)
    return near_one / _norm(near_one).clamp_min(torch.finfo(gradient.dtype).tiny)


def _norm(tensor: Tensor) -> Tensor:
    return per_image(torch.linalg.vector_norm(tensor.flatten(1), dim=1))


def within(change: Tensor, eps: float, norm: str) -> Tensor:
    """A change, scaled down to the ball if it is larger."""
    if norm == "linf":
        return change.clamp(-eps, eps)
    return change * (eps / length(change).clamp_min(eps))


def project(images: Tensor, clean: Tensor, eps: float, norm: str) -> Tensor:
    """Project to the ball around the clean images, then clamp to [0, 1], which keeps them in the ball."""
    return (clean + within(images - clean, eps, norm)).clamp(0, 1)


class Starts:
    """Random points of the ball for each restart: from `generator` if given, else keyed by (seed, image)."""

    def __init__(
        self,
        clean: Tensor,
        generator: torch.Generator | None,
        seed: int,
        indices: Tensor | None,
    ) -> None:
        self.clean = clean
        self.generator = generator
        if indices is None:
            indices = torch.arange(len(clean))
        elif len(indices) != len(clean):
            raise ValueError(f"indices must hold one entry per image ({len(clean)}); got {len(indices)}")
        self.indices = indices
        if generator is None:
            self.keyed = KeyedRandom(seed, "attack", indices.to(clean.device))

    def uniform(self) -> Tensor:
        """[B, C, H, W] within (-1, 1)."""
        if self.generator is None:
            values = self.keyed.uniform(*self.clean.shape[1:])
        else:
            values = torch.rand(self.clean.shape, generator=self.generator, device=self.generator.device)
        return carried(values, self.clean.device).to(self.clean.dtype).mul_(2).sub_(1)

    def point(self, eps: float, norm: str) -> Tensor:
        """Clean images plus noise that is uniform in the ball, clamped to [0, 1]."""
        noise = self.uniform()
        if norm == "l2":
            size = noise[0].numel()
            # the direction of a Gaussian and (radius / eps)^dimension are uniform;
            # erfinv is infinite at the ends of the interval
            inside = 1 - torch.finfo(torch.float32).eps
            gaussian = torch.erfinv(noise.clamp(-inside, inside)) * math.sqrt(2)
            radius = (self.uniform()[:, :1, :1, :1] + 1) / 2
            noise = direction(gaussian, norm) * radius ** (1 / size)
        return (self.clean + eps * noise).clamp(0, 1)
