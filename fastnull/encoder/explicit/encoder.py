"""The encoder with forward and input gradient written out over preallocated buffers: what the fast backends run.

It knows no device: the ops it calls (fastnull.ops) choose their implementation by the tensors they get.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
"""Images that pass through at once on the CPU: as many as CPU_BYTES of a block's widest buffer, its MLP's, take, and at
least CPU_IMAGES. Their number bounds the memory. The products want many rows: half of it costs a ViT-S/16 step 2 %."""


class ExplicitEncoder:
    """A pre-norm ViT from the site to the logits and back to the site.

    Args:
        vit: adapter of the live model.
        parts: what the adapter's `parts()` gave.
        dtype: of what is kept and handed out; norms' statistics, the last block of a class-token model and the head
            have at least float32.
        compute: of weights and products, see block.py; None is `dtype`.
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
        self._capacity = 0
        self._saved: list[Saved] = []
        self._scratch: Scratch
        self._stream: Tensor  # of all blocks, [capacity, P + N, D]; in the backward its gradient
        self.sync()

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.stem.weight.device

    @torch.no_grad()
    def sync(self, units: Units | None = None) -> None:
        """Cast and fold the model's current weights into the buffers, in place. The model may be sharded in units."""
        # what it takes to read the weights of a module: of the model for all that lies around its blocks
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
        """Images [B, C, H, W] → the tensor at the site, in memory of its own."""
        if site == "pixels":
            return images.to(self.dtype)
        patches = self.stem.patches(images)
        if site == "patch":
            return patches
        out = empty((len(images), self.stem.tokens, self.width), dtype=self.dtype, device=self.device)
        self.stem.prepare(patches, out)
        return out

    def logits(self, tokens: Tensor, site: str) -> Tensor:
        """The tensor at the site → logits [B, K] in float32 or better. Uses one block's buffers for all."""
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
        """Logits, the gradient of Σ logits · cotangent at the site, in memory of their own, and the results beside it.

        Args:
            tokens: the tensor at the site.
            site: which.
            cotangent: called with logits and the images they belong to; returns the cotangent, and results beside it.
            by_image: the images may come in several calls; what is kept for the backward is kept for those of one.
            sum_every: sum the gradient over so many images each time, in float32 or better.
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
        results = []  # of each part: logits, and what came beside the cotangent
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
        """Tokens at the site → logits, for as many images as are kept at once."""
        B = len(tokens)
        self._reserve(B, forward_only)
        saved = self._saved
        if forward_only and saved:
            saved = [saved[0]] * len(self.blocks)
        stream = self._stream[:B]
        self._enter(tokens, site, stream)
        for block, one in zip(self.blocks, saved, strict=True):
            for part in self._parts(B):
                rows = stream[part].view(-1, self.width)
                block.forward(one, self._scratch, self._rows(part), part.stop - part.start, rows)
        return self.head.forward(stream if self.last is None else self.last.forward(stream).unsqueeze(1), self._shift)

    def _backward(self, cotangent: Tensor, tokens: Tensor, site: str) -> Tensor:
        """Gradient of the logits [B, K] → of the tokens at the site, in memory that the next pass overwrites."""
        B = len(cotangent)
        gradient = self._stream[:B]  # [B, P + N, D]: nothing reads the stream any more
        if self.last is not None:
            row = torch.empty(B, 1, self.width, dtype=self.last.dtype, device=self.device)
            self.head.backward(cotangent, row)
            self.last.backward(row[:, 0], gradient)
        else:
            self.head.backward(cotangent, gradient)
        for block, saved in zip(reversed(self.blocks), reversed(self._saved), strict=True):
            for part in self._parts(B):
                rows = gradient[part].view(-1, self.width)
                block.backward(saved, self._scratch, self._rows(part), part.stop - part.start, rows)
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
        """The images of a batch in parts of equal size, as near as can be."""
        count = -(-B // self._part) if self._part else 1
        ends = [round(B * index / count) for index in range(count + 1)] if B else []
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def _rows(self, part: slice) -> slice:
        return slice(part.start * self.stem.tokens, part.stop * self.stem.tokens)

    def _reserve(self, B: int, forward_only: bool) -> None:
        """Make room for B images; buffers only ever grow."""
        wanted = min(1, len(self.blocks)) if forward_only else len(self.blocks)
        if self._capacity < B or len(self._saved) < wanted:
            self._capacity = max(B, self._capacity)
            N = self.stem.tokens

            def new(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
                return empty(shape, dtype=dtype or self.dtype, device=self.device)

            count = max(wanted, len(self._saved))
            if self._saved:  # give the memory back before asking for more
                del self._saved, self._stream, self._scratch
            self._saved = [Saved(self._capacity * N, block, new) for block in self.blocks[:count]]
            self._stream = new(self._capacity, N, self.width, dtype=self.compute)
            if self.blocks:
                images = min(self._capacity, self._part or self._capacity)
                self._scratch = Scratch(images * N, self.blocks[0], new)

    def token_shape(self, site: str) -> tuple[int, int] | None:
        """Of an image's tokens at the site; None in pixels."""
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
        scratch = [self._stream, *_tensors(self._scratch)] if self._saved else []
        kept = [tensor for saved in self._saved for tensor in _tensors(saved)]
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
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
