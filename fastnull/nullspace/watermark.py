"""Watermarks that a model does not see: a pattern in the exact nullspace of its patch embedding, and finding it again.

The mark of a key is white noise drawn from the key and projected onto the nullspace, so who knows the key and the patch
embedding can look for it, and the model's own outputs on the picture stay as they were. Finding is a correlation with
the picture's nullspace part (spread spectrum, after Cox et al. 1997). Under a wrong key the mark is a uniformly random
direction of a space of `dim` dimensions a patch, whatever the picture: the false positive rate is therefore exact.
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
    """What `detect` found in each picture.

    Attributes:
        score: [B], correlation of the mark with what is found in its place, −1 to 1.
        false_positive_rate: [B], how often a picture without the mark scores as high.
    """

    score: Tensor
    false_positive_rate: Tensor


def key_mark(ns: PatchNullspace, key: int, size: tuple[int, int]) -> Tensor:
    """The mark of a key, for pictures of a size: nullspace noise [C, H, W] of rms 1.

    Raises:
        ValueError: H or W no multiple of the patch, or no nullspace.
    """
    return ns.sample(torch.empty(1, ns.channels, *size, dtype=torch.float32), generator=generator(key))[0]


def embed(ns: PatchNullspace, images: Tensor, mark: int | Tensor, strength: float = STRENGTH) -> Tensor:
    """Pictures that carry the mark, within valid pixels, with the tokens (hence logits) of `images`.

    Of all such pictures the one nearest to image + strength · mark, so near black and white less of the mark fits.

    Args:
        ns: of the model that must not see it. A NormalizedModel takes pixels, as the images are here.
        images: [B, C, H, W] in [0, 1].
        mark: a key, or a pattern [C, H, W] or [B, C, H, W], of which the part in the nullspace is taken.
        strength: root mean square of the mark that is added, pixels in [0, 1].

    Returns:
        [B, C, H, W] in [0, 1] and the dtype of the images. Saving them in 8 bits moves tokens by the rounding, not by
        the mark.

    Raises:
        TypeError, ValueError: as PatchNullspace.maximize; a strength that is not above 0; a mark of another shape, or
            one without a part in the nullspace.
    """
    check_images(images)
    check_number("strength", strength, 0, exclusive=True)
    return ns.maximize(images, images.double() + strength * _pattern(ns, mark, images))


def read(ns: PatchNullspace, images: Tensor, original: Tensor | None = None) -> Tensor:
    """What lies in the nullspace, where a mark would be: the mark itself, up to rounding, where the original is given.

    Args:
        ns: of the model.
        images: [B, C, H, W] in [0, 1].
        original: the pictures without the mark, shaped alike; None reads mark and picture together.

    Returns:
        [B, C, H, W] in float64.

    Raises:
        TypeError, ValueError: pictures that are no pixels, or an original of another shape.
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
    """Look for a mark: correlate it with what `read` gives, or without the original with that of the Laplacian.

    The false positive rate of a key is exact: under a wrong one the score's r·√((n − 1) / (1 − r²)), n = patches · dim,
    has Student's t distribution with n − 1 degrees of freedom. A pattern that was not drawn at random, such as another
    picture, may be like pictures that do not carry it: give some of those as `unmarked`, and the rate is the fraction
    of them that score as high, (1 + how many) / (1 + all).

    Args:
        ns: of the model.
        images: [B, C, H, W] in [0, 1].
        mark: as it was given to `embed`.
        original: the pictures without the mark, which raises the score; None looks without them.
        unmarked: pictures [n, C, H, W] without the mark, for a rate counted instead of computed. Not with `original`.

    Raises:
        TypeError, ValueError: as `read` and `embed`; unmarked pictures beside an original, or of another size.
    """
    found = _whitened(ns, images) if original is None else read(ns, images, original)
    score = _correlation(found, _pattern(ns, mark, images))
    if unmarked is None:
        patches = images[0].numel() // (ns.dim + ns.rank)
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
        raise ValueError("mark has no part in the nullspace of this patch embedding, so nothing of it can be hidden")
    return pattern / rms


def _whitened(ns: PatchNullspace, images: Tensor) -> Tensor:
    """Where the mark would be, without most of the picture: [B, C, H, W] in float64.

    The picture is noise to who looks for the mark. Its power falls as 1/frequency², which the Laplacian undoes; without
    it a mark of 8/255 in photographs of 32 pixels is found with certainty (1e-6) in one of four, with it in all.
    """
    check_images(images)
    x = F.pad(images.double(), (1, 1, 1, 1), mode="replicate")
    sides = x[..., 1:-1, :-2] + x[..., 1:-1, 2:] + x[..., :-2, 1:-1] + x[..., 2:, 1:-1]
    return ns.project(4 * x[..., 1:-1, 1:-1] - sides)


def _correlation(found: Tensor, pattern: Tensor) -> Tensor:
    """[B]; 0 where there is nothing to correlate with."""
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
