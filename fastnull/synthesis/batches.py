"""Batches of images for synthesis: checked, embedded, kept for later rounds, and partly held out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnull.checks import check_finite, check_images
from fastnull.encoder.frozen import FrozenEncoder
from fastnull.synthesis.config import SynthesisConfig
from fastnull.vit.base import NormalizedModel

HELD_OUT = 0.1
KEPT_FRACTION = 0.5
"""Fraction of a GPU's free memory that kept tokens may take."""

Pair = tuple[Tensor, Tensor]
"""Clean tokens at the site [B, ...] and clean logits [B, K]."""


class Batches:
    """Images for universal synthesis, with clean tokens and logits: kept or computed again, by config.keep."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        source: Tensor | Iterable[Any],
        check: Tensor | Iterable[Any] | None,
        config: SynthesisConfig,
    ) -> None:
        self._encoder = encoder
        self._kept: list[Pair] = []
        source, held_out, self.check_origin = hold_out(source, check, config)
        self._source = source
        self._size = one_size([*(source if isinstance(source, Sequence) else ()), *(held_out or ())])
        self._keeps = isinstance(source, Sequence) if config.keep is None else config.keep
        self.batches = _length(source)
        if not self.batches:
            raise ValueError("batches must hold at least one batch of images; it is empty")
        # the published code's int(), but at least one batch
        self.per_round = max(1, int(config.image_fraction * self.batches))
        if held_out is None:  # published: no images are held out, the training images are judged
            self.check = list(self._round())
        else:
            self.check = [embed_batch(encoder, batch, self._size) for batch in held_out]
        if not self.check:
            raise ValueError("check must hold at least one batch of images; it is empty")
        self.like = self.check[0][0]
        self.shape = tuple(self.like.shape[1:])

    def stream(self) -> Iterator[Pair]:
        """Clean tokens and logits, round after round, without end."""
        while True:
            empty = True
            for pair in self._round():
                empty = False
                yield pair
            if empty:
                raise ValueError("batches gave no images in a later round: pass a sequence or a re-iterable loader")

    def _round(self) -> Iterator[Pair]:
        if len(self._kept) == self.per_round:
            yield from self._kept
            return
        self._kept.clear()  # of a round that was not finished
        for index, batch in zip(range(self.per_round), self._source, strict=False):
            pair = embed_batch(self._encoder, batch, self._size)
            if index == 0 and self._keeps:
                self._keeps = self._fit(pair)
            if self._keeps:
                self._kept.append(pair)
            yield pair

    def _fit(self, pair: Pair) -> bool:
        """Whether the batches of a round can stay on the device, if all are as large as this one."""
        device = pair[0].device
        if device.type != "cuda":
            return True
        needed = self.per_round * sum(value.numel() * value.element_size() for value in pair)
        free, _ = torch.cuda.mem_get_info(device)
        if needed <= KEPT_FRACTION * free:
            return True
        warnings.warn(
            f"fastnull: the clean tokens of {self.per_round} batches take {needed / 1e9:.1f} GB, {device} has "
            f"{free / 1e9:.1f} GB free: they are computed again in every round. Use fewer images, a smaller "
            "image_fraction or a 16-bit encoder to keep them",
            stacklevel=2,
        )
        return False


def hold_out(
    source: Tensor | Iterable[Any], check: Tensor | Iterable[Any] | None, config: SynthesisConfig
) -> tuple[Iterable[Any], list[Any] | None, str]:
    """Training batches, check batches (None: the training batches) and where the check batches come from."""
    source = [source] if isinstance(source, Tensor) else source
    if check is not None:
        return source, list(as_batches(check)), "given"
    if not isinstance(source, Sequence):
        count = max(1, round(HELD_OUT * _length(source)))
        return source, [batch for batch, _ in zip(source, range(count), strict=False)], "first batches of the loader"
    if config.stop != "check":
        return source, None, "the training images"
    if len(source) > 1:
        count = max(1, round(HELD_OUT * len(source)))
        return source[:-count], list(source[-count:]), "held-out batches"
    images = _images(source[0]) if source else None
    if isinstance(images, Tensor) and len(images) > 1:
        count = max(1, round(HELD_OUT * len(images)))
        return [images[:-count]], [images[-count:]], "held-out images"
    return source, None, "the training images"


def _length(source: Any) -> int:
    if iter(source) is source:
        raise ValueError("batches is an iterator, which can be read once; pass a list, a tensor or a DataLoader")
    try:
        return len(source)
    except TypeError as error:
        raise ValueError("batches has no length; pass a list, a tensor or a sized DataLoader") from error


def as_batches(source: Tensor | Iterable[Any]) -> Iterator[Any]:
    """The batches of a source, which may be a single tensor."""
    yield from (source,) if isinstance(source, Tensor) else source


def _images(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def one_size(batches: Iterable[Any]) -> tuple[int, ...] | None:
    """(H, W) of the images of all batches; None if there are none. What is not images is reported by `check_batch`.

    Raises:
        ValueError: images of two sizes, since one tensor cannot hold noise for both.
    """
    size: tuple[int, ...] | None = None
    for images in map(_images, batches):
        if isinstance(images, Tensor) and images.ndim == 4:
            size = _same_size(images, size)
    return size


def count_images(source: Tensor | Iterable[Any]) -> int | None:
    """Number of images of a tensor or a sequence of batches; None for a loader, which would have to be read."""
    if isinstance(source, Tensor):
        return len(source)
    if not isinstance(source, Sequence):
        return None
    counts = [len(images) for images in map(_images, source) if isinstance(images, Tensor)]
    return sum(counts) if len(counts) == len(source) else None


def _same_size(images: Tensor, size: tuple[int, ...] | None) -> tuple[int, ...]:
    mine = tuple(images.shape[2:])
    if size is not None and mine != size:
        one, other = ("x".join(map(str, each)) for each in (size, mine))
        raise ValueError(f"all images of a synthesis, the check images too, must be of one size; got {one} and {other}")
    return mine


def embed_batch(encoder: FrozenEncoder, batch: Any, size: tuple[int, ...] | None = None) -> Pair:
    """Check a batch, and its (H, W) if `size` is given; return its clean tokens at the site [B, ...] and logits
    [B, K]."""
    images = _images(batch)
    check_batch(encoder, images)
    _same_size(images, size)
    tokens = encoder.embed(images.to(encoder.device))
    clean = encoder(tokens)
    check_finite("logits of the clean images", clean)
    return tokens, clean


def check_batch(encoder: FrozenEncoder, images: Any) -> None:
    """Check images against the model: shape, dtype and, if the model takes pixels, the range [0, 1]."""
    vit = encoder.vit
    takes_pixels = isinstance(vit.model, NormalizedModel) or encoder.site == "pixels"
    check_images(images, channels=vit.channels, size=vit.image_size, unit_range=takes_pixels)
    if len(images) == 0:
        raise ValueError("images must hold at least one image; the batch is empty")
