"""The encoder of the fast backends: forward and input gradient written out over preallocated buffers.

Its code is the same for all devices: the ops it calls (fastnull.ops) choose their implementation by their tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastnull.distributed.sharded import Units
from fastnull.encoder.explicit.block import Block, Saved, Scratch
from fastnull.encoder.explicit.class_token import ClassTokenBlock
from fastnull.encoder.explicit.folded import FoldedLinear
from fastnull.encoder.explicit.stem_and_head import Head, Stem
from fastnull.ops.common import empty
from fastnull.vit.base import SplitViT
from fastnull.vit.parts import ViTParts

CPU_BYTES = 2_500_000
CPU_IMAGES = 8
"""Images in a block at once on the CPU: as many as fill CPU_BYTES of its widest buffer, the MLP's, and at least
CPU_IMAGES. Fewer take less memory, but products want many rows: with half as many a ViT-S/16 step takes 2 % longer."""


class Buffers:
    """The memory that a pass writes. Its size is fixed, since CUDA graphs hold the addresses.

    Args:
        images: most images of a pass.
        part: most images of it in one block at once.
        blocks: those that keep something for the backward.
        new: (shape, dtype) → a tensor; dtype None is that of what is kept.
        tokens, width: of an image.
        compute: dtype of products, the stream and gradients.
    """

    def __init__(
        self,
        images: int,
        part: int,
        blocks: Sequence[Block],
        new: Callable[..., Tensor],
        tokens: int,
        width: int,
        compute: torch.dtype,
    ) -> None:
        self.images = images
        self.saved = [Saved(images * tokens, block, new) for block in blocks]
        self.stream = new(images, tokens, width, dtype=compute)  # of all blocks; in the backward its gradient
        self.scratch: Scratch
        if blocks:
            self.scratch = Scratch(part * tokens, blocks[0], new)


class ExplicitEncoder:
    """A pre-norm ViT from the site to the logits and back to the site.

    Args:
        vit: adapter of the live model.
        parts: what the adapter's `parts()` gave.
        dtype: of what is kept and returned; norms' statistics, the last block of a class-token model and the head have
            at least float32.
        compute: dtype of weights and products, see block.py; None is `dtype`.
    """

    def __init__(
        self,
        vit: SplitViT,
        parts: ViTParts,
        dtype: torch.dtype,
        compute: torch.dtype | None = None,
    ) -> None:
        normalized = vit.normalized
        mean, std = (normalized.mean, normalized.std) if normalized else (None, None)
        self.dtype, self.compute = dtype, compute or dtype
        self._model = vit.model
        self.stem = Stem(parts, mean, std, dtype)
        self.head = Head(parts, dtype)
        last = parts.blocks[-1]
        absorbed = self.head.reads_class_token_alone and last.q_norm is None and last.k_norm is None
        self.last = ClassTokenBlock(last, dtype) if absorbed else None
        whole = parts.blocks[:-1] if absorbed else parts.blocks
        self.blocks = [Block(block, dtype, self.compute) for block in whole]
        self.width = parts.projection.out_channels
        image = self.stem.tokens * parts.blocks[0].fc1.out_features * self.compute.itemsize
        self._part = max(CPU_IMAGES, round(CPU_BYTES / image)) if self.device.type == "cpu" else None
        self._shift = torch.zeros(self.width, dtype=self.head.dtype, device=self.device)  # of the head's input
        self._for_gradients: Buffers | None = None
        self._for_logits: Buffers | None = None  # of one block, if those for gradients are too small
        self.sync()

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.stem.weight.device

    @torch.no_grad()
    def sync(self, units: Units | None = None) -> None:
        """Cast and fold the model's current weights, in place. The model may be sharded in units."""
        # a unit is gathered to read its weights; those outside the blocks belong to the model's own unit
        gathered = nullcontext if units is None else units.gathered
        with gathered(self._model):
            self.stem.sync()
            self.head.sync()
        shift = torch.zeros_like(self._shift)
        for block in self._all_blocks():
            with gathered(block.parts.norm1):
                shift = block.sync(shift)
        self._shift.copy_(shift)

    def embed(self, images: Tensor, site: str) -> Tensor:
        """Images [B, C, H, W] → the tensor at the site, in new memory."""
        if site == "pixels":
            return images.to(self.dtype)
        patches = self.stem.patches(images)
        if site == "patch":
            return patches
        out = empty((len(images), self.stem.tokens, self.width), dtype=self.dtype, device=self.device)
        self.stem.prepare(patches, out)
        return out

    def logits(self, tokens: Tensor, site: str) -> Tensor:
        """The tensor at the site → logits [B, K] in float32 or float64. All blocks use the buffers of one."""
        logits = [self._forward(tokens[part], site, forward_only=True) for part in self._parts(len(tokens))]
        return torch.cat(logits) if logits else self._no_logits()

    def input_gradient(
        self,
        tokens: Tensor,
        site: str,
        cotangent: Callable[[Tensor, slice], tuple[Tensor, ...]],
        by_image: bool,
        sum_every: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Logits, the gradient of Σ logits · cotangent at the site, both in new memory, and the other results.

        Args:
            tokens: the tensor at the site.
            site: its name.
            cotangent: called with logits and the slice of their images; returns the cotangent and other results.
            by_image: the cotangent may be called for parts of the batch; the backward then keeps one part only.
            sum_every: sum the gradient over every so many images in a row, in float32 or float64.
        """
        B = len(tokens)
        if sum_every is None:
            gradient = empty(tokens.shape, dtype=self.dtype, device=self.device)
        else:
            gradient = torch.zeros(B // sum_every, *tokens.shape[1:], dtype=self.head.dtype, device=self.device)
        if B == 0:
            logits = self._no_logits()
            _, *aux = cotangent(logits, slice(0, 0))
            return logits, gradient, *aux
        parts = self._parts(B) if by_image else [slice(0, B)]
        results = []  # of each part: logits, and the other results
        for images in parts:
            logits = self._forward(tokens[images], site)
            weights, *aux = cotangent(logits, images)
            results.append((logits, *aux))
            given = self._backward(weights, tokens[images], site)
            if sum_every is None:
                gradient[images] = given
            else:
                _add_sums(gradient, given, images, sum_every)
        logits, *aux = results[0] if len(parts) == 1 else map(torch.cat, zip(*results, strict=True))
        return logits, gradient, *aux

    def _forward(self, tokens: Tensor, site: str, forward_only: bool = False) -> Tensor:
        """Tokens at the site → logits, in one pass."""
        B = len(tokens)
        buffers = self._reserve(B, forward_only)
        saved = buffers.saved
        if forward_only and saved:
            saved = [saved[0]] * len(self.blocks)
        stream = buffers.stream[:B]
        self._enter(tokens, site, stream)
        for block, one in zip(self.blocks, saved, strict=True):
            for part in self._parts(B):
                rows = stream[part].view(-1, self.width)
                block.forward(one, buffers.scratch, self._rows(part), part.stop - part.start, rows)
        return self.head.forward(stream if self.last is None else self.last.forward(stream).unsqueeze(1), self._shift)

    def _backward(self, cotangent: Tensor, tokens: Tensor, site: str) -> Tensor:
        """Gradient of the logits [B, K] → of the tokens at the site, in buffers that the next pass overwrites."""
        B, buffers = len(cotangent), self._for_gradients
        assert buffers is not None, "backward without forward"
        gradient = buffers.stream[:B]  # [B, P + N, D]: nothing reads the stream any more
        if self.last is not None:
            row = torch.empty(B, 1, self.width, dtype=self.last.dtype, device=self.device)
            self.head.backward(cotangent, row)
            self.last.backward(row[:, 0], gradient)
        else:
            self.head.backward(cotangent, gradient)
        for block, saved in zip(reversed(self.blocks), reversed(buffers.saved), strict=True):
            for part in self._parts(B):
                rows = gradient[part].view(-1, self.width)
                block.backward(saved, buffers.scratch, self._rows(part), part.stop - part.start, rows)
        if site == "block0":
            return gradient
        patches = self.stem.prepare_gradient(gradient.to(self.dtype))
        return patches if site == "patch" else self.stem.patches_gradient(patches, tokens)

    def _enter(self, tokens: Tensor, site: str, x: Tensor) -> None:
        """Write the input of the first block into x [B, P + N, D]."""
        if site == "block0":
            x.copy_(tokens)
        else:
            self.stem.prepare(tokens.to(self.dtype) if site == "patch" else self.stem.patches(tokens), x)

    def _all_blocks(self) -> list[Block | ClassTokenBlock]:
        return [*self.blocks, *([self.last] if self.last is not None else [])]

    def _no_logits(self) -> Tensor:
        return torch.empty(0, len(self.head.linears[0].bias), dtype=self.head.dtype, device=self.device)

    def _parts(self, B: int) -> list[slice]:
        """The images of a batch in parts of nearly equal size."""
        count = -(-B // self._part) if self._part else 1
        ends = [round(B * index / count) for index in range(count + 1)] if B else []
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def _rows(self, part: slice) -> slice:
        return slice(part.start * self.stem.tokens, part.stop * self.stem.tokens)

    def _reserve(self, B: int, forward_only: bool) -> Buffers:
        """Buffers for B images, new ones if those in use are too small."""
        if self._for_gradients is not None and self._for_gradients.images >= B:
            return self._for_gradients
        if forward_only:
            if self._for_logits is None or self._for_logits.images < B:
                self._for_logits = None  # give the memory back before asking for more
                self._for_logits = self._new_buffers(B, self.blocks[:1])
            return self._for_logits
        if self._for_logits is not None and self._for_logits.images <= B:
            self._for_logits = None
        self._for_gradients = None
        self._for_gradients = self._new_buffers(B, self.blocks)
        return self._for_gradients

    def _new_buffers(self, images: int, blocks: Sequence[Block]) -> Buffers:
        def new(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return empty(shape, dtype=dtype or self.dtype, device=self.device)

        part = min(images, self._part or images)
        return Buffers(images, part, blocks, new, self.stem.tokens, self.width, self.compute)

    def buffers(self) -> list[Buffers]:
        """Those in use."""
        return [held for held in (self._for_gradients, self._for_logits) if held is not None]

    def token_shape(self, site: str) -> tuple[int, int] | None:
        """Shape of an image's tokens at the site; None in pixels."""
        if site == "pixels":
            return None
        return self.stem.tokens if site == "block0" else len(self.stem.positions), self.width

    def memory(self) -> dict[str, int]:
        """Bytes held: `weights`, `kept` for the backward, and `scratch`."""
        linears: list[FoldedLinear] = [*self.head.linears]
        for block in self._all_blocks():
            linears += block.linears()
        weights = [self.stem.weight, self.stem.bias, self.stem.prefix, self.stem.positions]
        weights += [tensor for linear in linears for tensor in linear.tensors()]
        kept = [tensor for held in self.buffers() for saved in held.saved for tensor in _tensors(saved)]
        scratch = [tensor for held in self.buffers() for tensor in _tensors(held)]
        scratch += [tensor for held in self.buffers() if held.saved for tensor in _tensors(held.scratch)]
        return {"weights": _bytes(weights), "kept": _bytes(kept), "scratch": _bytes(scratch)}


def _add_sums(sums: Tensor, gradient: Tensor, images: slice, every: int) -> None:
    """Add the gradient [b, ...] of a batch's `images` to the sums [B / every, ...] over `every` images each."""
    for index in range(images.start // every, -(-images.stop // every)):
        start, stop = max(images.start, index * every), min(images.stop, (index + 1) * every)
        sums[index] += gradient[start - images.start : stop - images.start].sum(0, dtype=sums.dtype)


def _tensors(holder: Any) -> list[Tensor]:
    found = []
    for value in vars(holder).values():
        found += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Tensor)]
    return found


def _bytes(tensors: list[Tensor]) -> int:
    distinct = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
