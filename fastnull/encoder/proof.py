"""Checks that a written-out encoder computes what the model does: its structure, then its values on two images."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnull.encoder.autograd import AutogradEncoder, NoGradientError
from fastnull.encoder.explicit.encoder import ExplicitEncoder
from fastnull.ops import AdamWState, adamw_step, noise_objective, normalized_step, patch_project, sign_step
from fastnull.rng import generator
from fastnull.selftest.problems import Problem, traced
from fastnull.vit.base import SplitViT
from fastnull.vit.exact import first_difference
from fastnull.vit.parts import UnsupportedModelError, ViTParts, need

PROBES = 2
TOLERANCES = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (3e-4, 3e-3),
    torch.float16: (3e-2, 1e-1),
    torch.bfloat16: (1e-1, 3e-1),
}
"""dtype → largest relative error, in L2 norm over both images, of logits and of the input gradient. In deep models
rounding reaches a tenth of it; a wrong formula gives errors as large as the values."""
TF32 = 30
"""Factor on the float32 tolerance if products may be rounded to TF32."""


def check_structure(vit: SplitViT, parts: ViTParts) -> None:
    """Raise UnsupportedModelError unless every module computes what its class says and every part is torch's own.

    Classes are checked only for adapters of this package; other adapters are responsible for those of their models.
    """
    ours = type(vit).__module__.startswith("fastnull.")
    difference = first_difference(vit.model.named_modules(), known_classes=ours)
    need(difference is None, str(difference))
    parts.check()


def problems_of(encoder: ExplicitEncoder) -> set[Problem]:
    """What the ops are asked in a step of synthesis with this encoder, and where its images are projected."""
    device, (p, across) = encoder.device, encoder.stem.patch
    tokens = torch.ones(PROBES, *(encoder.token_shape("block0") or ()), dtype=encoder.dtype, device=device)
    pixels = encoder.stem.weight.shape[1]  # C·p·p
    basis = torch.ones(pixels, 1, device=device)
    noise = torch.ones(PROBES, pixels // p**2, p, p, device=device)
    with traced() as problems:

        def cotangent(logits: Tensor, images: slice) -> tuple[Tensor]:
            return (noise_objective(logits, logits + 1).cotangent,)

        _, gradient = encoder.input_gradient(tokens, "block0", cotangent, True)
        for grad in (gradient, gradient.float()):
            moved = torch.zeros_like(grad, dtype=torch.float32)
            adamw_step(moved, grad, AdamWState.zeros(moved), lr=0.1)
            normalized_step(moved, grad, lr=0.1)
            sign_step(moved, grad, lr=0.1)
        for complement in (False, True) if p == across else ():
            patch_project(noise, basis, p, complement)
    return problems


def check_values(vit: SplitViT, encoder: ExplicitEncoder, site: str) -> None:
    """Raise UnsupportedModelError unless logits and input gradient of two random images equal those of the model under
    autograd, in float32 or float64.

    Args:
        vit: adapter of the live model.
        encoder: made of it, with its current weights.
        site: where the gradient is taken.
    """
    weight = vit.projection.weight
    if vit.image_size is None or weight.is_meta:
        return
    exact = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    source = generator(0)
    images = torch.rand(PROBES, vit.channels, *vit.image_size, generator=source).to(weight.device, exact)
    model = AutogradEncoder(vit, exact)
    tokens = model.embed(images, site)
    cotangents: list[Tensor] = []

    def cotangent(logits: Tensor, images: slice) -> tuple[Tensor]:
        if not cotangents:
            cotangents.append(torch.randn(PROBES, logits.shape[1], generator=source).to(logits))
        return (cotangents[0][images].to(logits.dtype),)

    try:
        expected = model.input_gradient(tokens, site, cotangent)
    except NoGradientError:
        raise UnsupportedModelError("a forward without input gradient") from None
    own = encoder.input_gradient(encoder.embed(images, site), site, cotangent, True)
    names = ("logits", "input gradient")
    for name, value, wanted, tolerance in zip(names, own, expected, _tolerances(vit, encoder), strict=True):
        error = float((value.to(exact) - wanted).norm() / wanted.norm().clamp_min(torch.finfo(exact).tiny))
        need(error <= tolerance, f"a model whose {name} would be off by {error:.1e} of its size when written out")


def _tolerances(vit: SplitViT, encoder: ExplicitEncoder) -> tuple[float, float]:
    # weights are folded in float32, unless they are float64
    folded = vit.projection.weight.dtype == torch.float64
    dtype = torch.float32 if encoder.dtype == torch.float64 and not folded else encoder.dtype
    logits, gradient = TOLERANCES[dtype]
    tf32 = encoder.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32
    return (TF32 * logits, TF32 * gradient) if tf32 else (logits, gradient)
