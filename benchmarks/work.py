"""FLOPs and bytes that a task needs, by formula; tests hold the FLOPs against torch's own counter.

B images, N tokens, D width, L blocks, H heads, C classes, M = B·N. One direction of a block's four linears is
g = 24·M·D² (hidden width 4·D), attention a = 4·B·N²·D, its backward 2.5·a (scores recomputed).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastnull.vit.base import SplitViT


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one call."""

    flop: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class ViTShape:
    """The sizes of a ViT with prefix tokens counted in N."""

    N: int
    D: int
    L: int
    H: int
    C: int

    @classmethod
    def of(cls, vit: SplitViT) -> ViTShape:
        """Of a model whose adapter names its parts."""
        parts = vit.parts()
        prefix, positions = parts.positions()
        return cls(
            N=len(prefix) + len(positions),
            D=parts.projection.out_channels,
            L=len(parts.blocks),
            H=parts.blocks[0].heads,
            C=vit.num_classes,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name → (in, out) of a block's linears."""
        D = self.D
        return {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}


def forward_flop(s: ViTShape, B: int) -> float:
    """From the first block's input to the logits."""
    return s.L * (_linears(s, B) + _attention(s, B)) + 2 * B * s.D * s.C


def input_gradient_flop(s: ViTShape, B: int) -> float:
    """From the logits back to the first block's input, no weight gradient."""
    return s.L * (_linears(s, B) + 2.5 * _attention(s, B)) + 2 * B * s.D * s.C


def class_token_saving(s: ViTShape, B: int) -> float:
    """What forward and input gradient save together where the last block computes the class token alone."""
    M = B * s.N
    absorbed = 4 * M * s.D * s.H + 24 * B * s.D**2
    return 2 * (_linears(s, B) - absorbed) + 3.5 * _attention(s, B)


def noise_step(s: ViTShape, B: int, itemsize: int) -> Work:
    """A step of synthesis with cached clean tokens and logits: the least that the mathematics needs.

    Bytes: every weight once in each direction, and the activations of a fused implementation, in units of
    T = B·N·D values per block: 49 and twice the kept derivative of GELU (2 T as one byte beside 16-bit
    values, else 4 T).
    """
    flop = forward_flop(s, B) + input_gradient_flop(s, B) - class_token_saving(s, B)
    tokens = B * s.N * s.D * itemsize
    kept = 2 if itemsize == 2 else 4
    weights = 12 * s.D**2 * itemsize
    return Work(flop, s.L * ((49 + 2 * kept) * tokens + 2 * weights))


def linear(M: int, K: int, N: int, itemsize: int) -> Work:
    """[M, K] x [K, N]."""
    return Work(2 * M * K * N, (M * K + K * N + M * N) * itemsize)


def _linears(s: ViTShape, B: int) -> float:
    return 24 * B * s.N * s.D**2


def _attention(s: ViTShape, B: int) -> float:
    return 4 * B * s.N**2 * s.D
