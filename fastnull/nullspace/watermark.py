"""Watermarks in the exact nullspace of a patch embedding, which do not change the model's outputs.

The mark of a key is white noise drawn from the key and projected onto the nullspace. It is detected by correlation with
the picture's nullspace part (spread spectrum, after Cox et al. 1997). Under a wrong key the mark is a uniformly random
direction of a space of `dim` dimensions per patch, whatever the picture, so the false positive rate is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnull.checks import check_images, check_number
from fastnull.nullspace.patch import PatchNullspace
from fastnull.rng import generator

STRENGTH = 8 / 255


@dataclass(frozen=True)
class Detection:
    """Result of `detect` for each picture.

    Attributes:
        score: [B], correlation of the mark with the picture's nullspace part, −1 to 1.
        false_positive_rate: [B], how often a picture without the mark scores as high.
    """

    score: Tensor
    false_positive_rate: Tensor


def key_mark(ns: PatchNullspace, key: int, size: tuple[int, int]) -> Tensor:
    """The mark of a key for pictures of `size`: nullspace noise [C, H, W] of rms 1.

    Raises:
        ValueError: H or W is smaller than a patch, or no nullspace.
    """
    return ns.sample(torch.empty(1, ns.channels, *size, dtype=torch.float32), generator=generator(key))[0]


def embed(ns: PatchNullspace, images: Tensor, mark: int | Tensor, strength: float = STRENGTH) -> Tensor:
    """Add a mark to pictures without changing their tokens (hence logits) or leaving [0, 1].

    Returns the nearest such picture to image + strength · mark: near black and white less of the mark fits.

    Args:
        ns: the nullspace of a NormalizedModel.
        images: [B, C, H, W] in [0, 1].
        mark: a key, or a pattern [C, H, W] or [B, C, H, W], which is projected onto the nullspace.
        strength: root mean square of the added mark, for pixels in [0, 1].

    Returns:
        [B, C, H, W] in [0, 1] and the dtype of the images. Saving in 8 bits changes the tokens only by the rounding.

    Raises:
        TypeError, ValueError: as PatchNullspace.maximize; strength <= 0; a mark of another shape, or without a part in
            the nullspace.
    """
    check_images(images)
    check_number("strength", strength, 0, exclusive=True)
    return ns.maximize(images, images.double() + strength * _pattern(ns, mark, images))


def read(ns: PatchNullspace, images: Tensor, original: Tensor | None = None) -> Tensor:
    """The part of pictures [B, C, H, W] in the nullspace, in float64; with the original, the mark up to rounding.

    Raises:
        TypeError, ValueError: values outside [0, 1], or an original of another shape.
    """
    check_images(images)
    if original is None:
        return ns.project(images.double())
    check_images(original, name="original")
    if original.shape != images.shape:
        raise ValueError(f"original must have the images' shape {list(images.shape)}; got {list(original.shape)}")
    return ns.project(images.double() - original.double())


def detect(
    ns: PatchNullspace,
    images: Tensor,
    mark: int | Tensor,
    original: Tensor | None = None,
    *,
    unmarked: Tensor | None = None,
) -> Detection:
    """Correlate a mark with the pictures' nullspace part; without the original, with that of their Laplacian.

    The false positive rate of a key is exact: under a wrong one the score's r·√((n − 1) / (1 − r²)), n = patches · dim,
    has Student's t distribution with n − 1 degrees of freedom. A pattern that was not drawn at random, such as another
    picture, may resemble unmarked pictures. Pass some of them as `unmarked`: the rate is then the fraction of them that
    score as high, (1 + count) / (1 + total).

    Args:
        ns: of the model.
        images: [B, C, H, W] in [0, 1].
        mark: as passed to `embed`.
        original: the pictures without the mark, which raises the score.
        unmarked: other pictures [n, C, H, W] without the mark. Not with `original`.

    Raises:
        TypeError, ValueError: as `read` and `embed`; both `unmarked` and `original`, or another size.
    """
    found = _whitened(ns, images) if original is None else read(ns, images, original)
    score = _correlation(found, _pattern(ns, mark, images))
    if unmarked is None:
        patches = ns.whole_patches(images)[0].numel() // (ns.dim + ns.rank)
        return Detection(score, _chance(score, patches * ns.dim))
    if original is not None:
        raise ValueError("unmarked pictures have no original to be compared with: give one of the two")
    check_images(unmarked, name="unmarked", channels=ns.channels, size=(images.shape[2], images.shape[3]))
    pattern = mark if isinstance(mark, int) or mark.ndim == 3 else None
    if pattern is None:
        raise ValueError("mark must be one key or pattern [C, H, W] for all pictures where unmarked ones are given")
    null = _correlation(_whitened(ns, unmarked), _pattern(ns, pattern, unmarked))  # [n]
    above = (null[None, :] >= score[:, None]).sum(1)
    return Detection(score, (1 + above).double() / (1 + len(null)))


def _pattern(ns: PatchNullspace, mark: int | Tensor, images: Tensor) -> Tensor:
    """The mark in the nullspace, rms 1: [1 or B, C, H, W] in float64."""
    if isinstance(mark, bool) or not isinstance(mark, (int, Tensor)):
        raise TypeError(f"mark must be a key (an integer) or a pattern (a tensor); got {type(mark).__name__}")
    if isinstance(mark, int):
        return key_mark(ns, mark, (images.shape[2], images.shape[3])).to(images.device, torch.float64)[None]
    if mark.shape not in (images.shape, images.shape[1:]):
        wanted = f"{list(images.shape[1:])} or {list(images.shape)}"
        raise ValueError(f"mark must have shape {wanted}; got {list(mark.shape)}")
    pattern = ns.project(mark.to(images.device, torch.float64).view(-1, *images.shape[1:]))
    rms = pattern.square().mean((1, 2, 3), keepdim=True).sqrt()
    if bool((rms <= 1e-6 * mark.abs().max()).any()):
        raise ValueError("mark has no part in the nullspace of this patch embedding, so it cannot be embedded")
    return pattern / rms


def _whitened(ns: PatchNullspace, images: Tensor) -> Tensor:
    """Nullspace part of the pictures' Laplacian: [B, C, H, W] in float64.

    The picture is noise for the detector. Its power falls as 1/frequency², which the Laplacian compensates. A mark of
    8/255 in photographs of 32 pixels is detected (rate below 1e-6) in one of four without it, and in all with it.
    """
    check_images(images)
    x = F.pad(images.double(), (1, 1, 1, 1), mode="replicate")
    sides = x[..., 1:-1, :-2] + x[..., 1:-1, 2:] + x[..., :-2, 1:-1] + x[..., 2:, 1:-1]
    return ns.project(4 * x[..., 1:-1, 1:-1] - sides)


def _correlation(found: Tensor, pattern: Tensor) -> Tensor:
    """Cosine similarity [B]; 0 if one of the two is 0."""
    products = (found * pattern).flatten(1).sum(1)
    lengths = torch.linalg.vector_norm(found.flatten(1), dim=1) * torch.linalg.vector_norm(pattern.flatten(1), dim=1)
    return torch.where(lengths == 0, 0.0, products / torch.where(lengths == 0, 1.0, lengths))


def _chance(score: Tensor, dimensions: int) -> Tensor:
    """P(r ≥ score) for the cosine r of a fixed and a uniformly random direction of a space."""
    try:
        from scipy.special import betainc
    except ImportError as error:
        raise ImportError(f"the false positive rate of a mark needs scipy (pip install scipy): {error}") from error
    r = score.clamp(-1, 1).cpu()
    # I is P(|r| ≥ |score|), and the distribution is symmetric
    tail = 0.5 * torch.from_numpy(betainc((dimensions - 1) / 2, 0.5, (1 - r.square()).numpy()))
    return torch.where(r >= 0, tail, 1 - tail).to(score.device)
