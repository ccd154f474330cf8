"""The measurements of evaluate(): for each reported number, the function that computes the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastnull.data.image_files import to_pixels
from fastnull.data.view import View
from fastnull.noise import Noise
from fastnull.ops.common import in_autocast
from fastnull.robustness.attacks import apgd, autoattack, cw_l2, fgsm, mi_fgsm, patch_attack, pgd
from fastnull.robustness.attacks.base import model_dtype, model_logits
from fastnull.robustness.corruptions import corrupt
from fastnull.robustness.metrics import correct
from fastnull.robustness.settings import BALL_ATTACKS, EvaluationSettings
from fastnull.robustness.table import eps_name
from fastnull.vit import split

if TYPE_CHECKING:
    from fastnull.encoder.frozen import FrozenEncoder

# settings of the suite cw: the defaults of torchattacks, without a search for the constant
CW: dict[str, Any] = {"initial_const": 1.0, "search_steps": 1, "steps": 50, "lr": 0.01}

Response = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, labels, indices) → the model's logits [B, K] on the changed images."""

GRADIENT_ATTACKS = ("fgsm", "pgd", "mi_fgsm", "apgd", "apgd_t")


def pixel_encoder(model: nn.Module) -> FrozenEncoder | None:
    """An encoder that computes the input gradients of a float32 model faster than autograd and was checked against it;
    None if there is none."""
    from fastnull.encoder.frozen import FrozenEncoder

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if model_dtype(model) != torch.float32 or in_autocast(device):
        return None
    try:
        encoder = FrozenEncoder(split(model), site="pixels")
    except ValueError:  # no adapter knows the model
        return None
    return None if encoder.backend == "reference" else encoder


@dataclass(frozen=True)
class Measurement:
    """One number: its path in the results, the function for its logits, and the folder suite of its images, if any."""

    path: tuple[str, ...]
    respond: Response
    suite: str | None = None

    @property
    def name(self) -> str:
        return "/".join(self.path)


def plain(model: nn.Module) -> Response:
    """Logits of the unchanged images."""
    return lambda images, labels, indices: model_logits(model, images)


def clean_and_attacked(
    model: nn.Module, source: nn.Module, settings: EvaluationSettings, worst: bool, encoder: FrozenEncoder | None
) -> list[Measurement]:
    """Clean accuracy, and attacks computed on `source` and tested on `model`, in the order in which they run.

    With `worst` (and `source` the model itself), misclassified images are not attacked, and the attack on an image
    stops when it succeeds. `encoder` (of the source) computes input gradients. The accuracy is always that of the
    model's own logits on the images that the attack returns.
    """
    norm, steps, seed = settings.norm, settings.steps, settings.seed
    right: dict[int, bool] = {}  # index of the image → whether the clean prediction is correct

    def clean(images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        logits = model_logits(model, images)
        right.update(zip(indices.tolist(), correct(logits, labels).tolist(), strict=True))
        return logits

    def response(attack: Response) -> Response:
        """Logits on the images that `attack` returns."""

        def respond(images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            if not worst:
                return model_logits(model, attack(images, labels, indices))
            numbers = indices.tolist()
            if not right.keys() >= set(numbers):  # a resumed run, or no suite clean
                clean(images, labels, indices)
            rows = torch.tensor([right[number] for number in numbers]).nonzero()[:, 0].to(images.device)
            attacked = images.clone()
            attacked[rows] = attack(images[rows], labels[rows], indices[rows])
            return model_logits(model, attacked)

        return respond

    def ball(suite: str, radius: float) -> Response:
        leaving: dict[str, Any] = {"leave": worst, "encoder": encoder}

        def attacked(images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            if suite == "fgsm":
                return fgsm(source, images, labels, radius, norm, encoder=encoder)
            if suite == "mi_fgsm":
                return mi_fgsm(source, images, labels, radius, steps=steps, norm=norm, **leaving)
            if suite == "autoattack":
                return autoattack(source, images, labels, radius, norm=norm, seed=seed, batch_size=len(images))
            keyed = {"steps": steps, "restarts": settings.restarts, "seed": seed, "indices": indices, **leaving}
            if suite == "pgd":
                return pgd(source, images, labels, radius, norm=norm, **keyed)
            loss = "dlr_targeted" if suite == "apgd_t" else "ce"
            return apgd(source, images, labels, radius, norm=norm, loss=loss, **keyed)

        return response(attacked)

    suites = settings.suites
    found = [Measurement(("clean",), clean)] if "clean" in suites else []
    for suite in BALL_ATTACKS:
        if suite in suites:
            found += [Measurement((suite, eps_name(radius, norm)), ball(suite, radius)) for radius in settings.eps]
    if "cw" in suites:
        found.append(Measurement(("cw",), response(lambda x, labels, _: cw_l2(source, x, labels, **CW))))
    if "patch" in suites:
        found.append(Measurement(("patch",), response(lambda x, labels, _: patch_attack(source, x, labels))))
    return found


def _shown(images: Tensor, show: Callable[[Any], Tensor]) -> Tensor:
    """Round images [B, C, H, W] down to 8 bits, as in the published files, and apply a transform of PIL images."""
    from PIL import Image

    pixels = images.mul(255).add(1e-3).byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([to_pixels(show(Image.fromarray(image.squeeze()))) for image in pixels]).to(images)


def noisy(model: nn.Module, noise: Noise) -> list[Measurement]:
    """Measurements with the noise at its site and with its permutation."""
    from fastnull.encoder.frozen import FrozenEncoder
    from fastnull.synthesis.solvers import perturb

    encoder = FrozenEncoder(model, site=noise.site, backend="reference")

    def added(tokens: Tensor) -> Response:
        def respond(images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            inputs = encoder.embed(images)
            if inputs.shape[1:] != tokens.shape[1:]:
                raise ValueError(
                    f"the noise is of shape {list(tokens.shape[1:])}, but the model's {noise.site} is of shape "
                    f"{list(inputs.shape[1:])}"
                )
            rows = tokens[(indices % len(tokens)).to(tokens.device)].to(inputs.device)
            return encoder(perturb(encoder, inputs, rows)).float()

        return respond

    return [
        Measurement(("noise", "learned"), added(noise.tokens)),
        Measurement(("noise", "permuted"), added(noise.permuted().tokens)),
    ]


def corrupted(model: nn.Module, settings: EvaluationSettings) -> list[Measurement]:
    """One measurement per corruption (computed in memory) and severity. With `corruption_size`, images are resized
    afterwards."""
    constants = "cifar10-c" if settings.corruption_size == 32 else "imagenet-c"
    show = None if settings.corruption_size is None else View.of(model).evaluation()
    same: dict[str, Any] = {"seed": settings.seed, "frost_folder": settings.frost_folder, "constants": constants}

    def respond(name: str, severity: int) -> Response:
        def corrupted(images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            changed = corrupt(images, name, severity, indices=indices, **same)
            return model_logits(model, changed if show is None else _shown(changed, show))

        return corrupted

    return [
        Measurement(("corruptions", name, str(int(severity))), respond(name, int(severity)))
        for name in settings.corruptions
        for severity in settings.severities
    ]
