"""The exact nullspace: its dimension, the part of pictures in it, and how exact its noise is in floating point."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull.analysis.measure import Row
from fastnull.data.photos import PHOTOS, load_picture
from fastnull.nullspace.inspection import inspect_models
from fastnull.nullspace.patch import PatchNullspace
from fastnull.ops.common import no_autocast
from fastnull.rng import generator
from fastnull.vit import frozen, split

FAMILIES = (
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224",
    "vit_small_patch32_224", "vit_base_patch32_224", "vit_huge_patch14_224", "deit_small_distilled_patch16_224",
    "vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "cait_xxs24_224", "mixer_b16_224", "swin_tiny_patch4_window7_224", "convnext_tiny",
    "xcit_nano_12_p16_224", "resnet18",
)  # fmt: skip
"""timm models whose patch embeddings `dimensions` compares."""

LEAK_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEAK_SCALES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Root mean squares of noise in pixels of [0, 1]; above about 0.3 it does not fit into a real picture."""


def dimensions(names: Sequence[str] = FAMILIES) -> list[Row]:
    """Rank and nullity of patch embeddings with random weights, which their shapes guarantee. Nothing is downloaded.

    Args:
        names: as for `fastnull.models.create_model`.

    Returns:
        Rows with model, values (C·ph·pw), width (D), rank, nullity, fraction (nullity / values), per_channel_nullity,
        `reason`: why the others are None, if there is no linear patch embedding.
    """
    kept = ("model", "values", "width", "rank", "nullity", "fraction", "per_channel_nullity", "reason")
    return [{key: row[key] for key in kept} for row in inspect_models(names)]


def natural_pictures(size: tuple[int, int], channels: int = 3) -> Tensor:
    """Centre squares of scikit-image's 13 pictures [13, channels, H, W], resized with antialiasing.

    Raises:
        ImportError: scikit-image is not installed.
    """
    squares = []
    for name in PHOTOS:
        picture = load_picture(name)  # [3, H, W] bytes
        side = min(picture.shape[1:])
        top, left = ((length - side) // 2 for length in picture.shape[1:])
        square = picture[None, :, top : top + side, left : left + side].float() / 255
        squares.append(F.interpolate(square, size=size, mode="bilinear", align_corners=False, antialias=True))
    images = torch.cat(squares).clamp(0, 1)
    return images.mean(1, keepdim=True).expand(-1, channels, -1, -1) if channels != 3 else images


def energy(space: PatchNullspace, images: Mapping[str, Tensor], seed: int = 0) -> list[Row]:
    """Fraction of the squared pixel values in the nullspace, and in that of a random matrix of the same shape.

    For white noise or a random matrix it is dim / (C·ph·pw) on average. Trained embeddings respond to the energy of
    pictures, so less of it is in the nullspace.

    Args:
        space: of the model.
        images: label → images [n, C, H, W].
        seed: of the random matrix and of white noise, which is measured too.

    Returns:
        Rows with images (label), weights (`model` or `random`), pixels (fraction of Σ x²), contrast (the same after
        subtracting each image's mean colour) and expected (dim / (C·ph·pw)).
    """
    source = generator(seed)
    like = next(iter(images.values()))
    sets = {**images, "white noise": torch.randn(like.shape, generator=source, dtype=torch.float32)}
    shape = (space.width, space.channels, *space.patch_size)
    random = PatchNullspace.from_weight(
        torch.randn(shape, generator=source, dtype=torch.float32), tolerance=space.tolerance
    )
    return [
        {
            "images": label,
            "weights": name,
            "pixels": _fraction(kernel, found),
            "contrast": _fraction(kernel, found - found.mean((2, 3), keepdim=True)),
            "expected": kernel.dim / (kernel.dim + kernel.rank),
        }
        for label, found in sets.items()
        for name, kernel in (("model", space), ("random", random))
    ]


def _fraction(space: PatchNullspace, images: Tensor) -> float:
    whole = space.whole_patches(images.double())
    return float(space.project(whole).square().sum() / whole.square().sum())


@torch.no_grad()
def leak(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[float] = LEAK_SCALES,
    dtypes: Sequence[torch.dtype] = LEAK_DTYPES,
    seed: int = 0,
) -> list[Row]:
    """Change of tokens and logits by exact nullspace noise in floating point, and by white noise of equal norm.

    Noise is added in float64 and the sum is rounded to the model's dtype, so the rounding of pixels is included.

    Args:
        model: a ViT whose patch embedding has a nullspace; not changed.
        images: [n, C, H, W].
        scales: root mean squares of the noise, in units of the images.
        dtypes: of the model.
        seed: of the noise.

    Returns:
        Rows with dtype, noise (`exact` or `random`), rms, norm (mean L2 norm per image), tokens and logits (‖change‖ /
        ‖clean‖ over all images) and agreement (fraction of unchanged predictions).

    Raises:
        ValueError: no nullspace, or no adapter for the model.
    """
    space = PatchNullspace.from_model(model)
    clean = images.double()
    source = generator(seed)
    exact = space.sample(clean.cpu(), generator=source).to(clean.device)
    random = torch.randn(clean.shape, generator=source, dtype=torch.float64).to(clean.device)
    random = random / random.square().mean((1, 2, 3), keepdim=True).sqrt()
    rows = []
    for dtype in dtypes:
        vit = split(copy.deepcopy(model).to(dtype))
        with frozen(vit.model), no_autocast(clean.device):

            def outputs(pixels: Tensor, vit=vit, dtype=dtype) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
                tokens = vit.patch(pixels.to(dtype))
                return tokens.double(), vit.logits(tokens, "patch").double()

            before = outputs(clean)
            for scale in scales:
                for name, noise in (("exact", exact), ("random", random)):
                    after = outputs(clean + scale * noise)
                    rows.append(
                        {
                            "dtype": str(dtype).removeprefix("torch."),
                            "noise": name,
                            "rms": scale,
                            "norm": scale * float(torch.linalg.vector_norm(noise.flatten(1), dim=1).mean()),
                            "tokens": _relative(after[0], before[0]),
                            "logits": _relative(after[1], before[1]),
                            "agreement": float((after[1].argmax(1) == before[1].argmax(1)).double().mean()),
                        }
                    )
    return rows


def _relative(after: Tensor, before: Tensor) -> float:
    return float(torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before))
