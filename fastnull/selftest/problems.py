"""The problems of the self-test: an op at the sizes of a model, with random arguments for any number of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnull.ops.attention import attention_dqkv_sdpa_out, attention_out_sdpa
from fastnull.ops.common import REFERENCES
from fastnull.ops.dispatch import SIGNATURES, Run, Signature, problem_name
from fastnull.ops.layer_norm import layer_norm_ref
from fastnull.ops.linear_gelu import derivative_dtype
from fastnull.ops.noise_objective import means_after

ATTENTIONS: dict[str, Run] = {"attention_out": attention_out_sdpa, "attention_dqkv_out": attention_dqkv_sdpa_out}
TOKENS = 197
"""Tokens per image for ops whose speed per row does not depend on it."""


@dataclass(frozen=True)
class Problem:
    """An op with the dtype and sizes that determine the choice of its implementation."""

    op: str
    signature: Signature

    @property
    def name(self) -> str:
        """Name in the results."""
        return problem_name(self.op, self.signature)

    @classmethod
    def named(cls, name: str) -> Problem:
        """The problem of this name."""
        op, dtype, *sizes = name.split(" ")
        return cls(op, (getattr(torch, dtype), tuple(map(int, sizes))))

    def arguments(self, images: int, seed: int, device: torch.device) -> tuple[Any, ...]:
        """Random arguments; outputs are filled with NaN (integers: 0xEE)."""
        dtype, sizes = self.signature
        return _ARGUMENTS[self.op](_Draw(images, dtype, torch.Generator(device).manual_seed(seed)), *sizes)

    def written(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        """The arguments that the op writes to."""
        schema = getattr(torch.ops.fastnull, self.op).default._schema.arguments
        changed = [given for given, each in zip(arguments, schema, strict=True) if each.alias_info is not None]
        return [given for given in changed if isinstance(given, Tensor)]

    @property
    def parts(self) -> list[Problem]:
        """Problems that the `library` implementation of this one dispatches to."""
        dtype, sizes = self.signature
        if self.op == "linear_gelu_out":
            return [Problem("gelu_out", (dtype, (sizes[0], sizes[2])))]
        return [Problem("dgelu_", (dtype, sizes[1:]))] if self.op == "linear_dgelu_out" else []

    @property
    def is_gradient(self) -> bool:
        """Whether the result is a gradient, whose direction is checked too."""
        return self.op in ("layer_norm_dx_out", "dgelu_", "linear_dgelu_out", "attention_dqkv_out")

    def reference(self) -> Run:
        """The formula, for float64."""
        if self.op == "noise_objective_means_out":  # its registered reference calls the op, which may run a kernel
            return functools.partial(means_after, REFERENCES["noise_objective_out"])
        return REFERENCES[self.op]

    def torchs_own(self) -> Run:
        """Torch's own operators, whose error in the problem's dtype sets the tolerance."""
        return ATTENTIONS.get(self.op, self.reference())

    def flop(self, arguments: tuple[Any, ...]) -> float:
        """FLOPs of the matrix products that the problem needs."""
        first, second = arguments[:2]
        if self.op.startswith("attention"):
            B, N, _, H, d = first.shape
            return (4.0 if self.op == "attention_out" else 10.0) * B * H * N * N * d
        if self.op.startswith("linear"):
            return 2.0 * len(first) * second.numel()
        if self.op == "patch_project_out":
            return 4.0 * first.numel() * second.shape[1]
        return 0.0

    def bytes(self, arguments: tuple[Any, ...]) -> float:
        """Bytes of all arguments; those changed in place count twice."""
        tensors = [given for given in arguments if isinstance(given, Tensor)]
        tensors += self.written(arguments) if self.op.endswith("_") else []
        return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


class _Draw:
    """Random tensors for a problem, on the generator's device."""

    def __init__(self, images: int, dtype: torch.dtype, source: torch.Generator) -> None:
        self.images, self.dtype, self._source = images, dtype, source
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._source, device=self._source.device)
        return drawn.to(dtype or self.dtype)

    def unwritten(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        fill = float("nan") if dtype.is_floating_point else 0xEE
        return torch.full(shape, fill, dtype=dtype, device=self._source.device)

    def derivative(self, *shape: int) -> Tensor:
        """A random gelu' in its stored dtype."""
        drawn = torch.rand(shape, generator=self._source, device=self._source.device)
        kept = derivative_dtype(self.dtype)
        return (drawn * 226 if kept == torch.uint8 else drawn).to(kept)


def _layer_norm(draw: _Draw, D: int, given: int) -> tuple[Any, ...]:
    M = draw.images * TOKENS
    mean, rstd = (draw.unwritten(M, dtype=draw.wide) for _ in range(2))
    shift = draw(D, dtype=draw.wide) if given & 1 else None
    return draw(1, M, D), None, None, shift, 1e-6, draw.unwritten(1, M, D), mean if given & 2 else None, rstd


def _layer_norm_dx(draw: _Draw, D: int, given: int) -> tuple[Any, ...]:
    x, dxhat, dres = (draw(1, draw.images * TOKENS, D) for _ in range(3))
    normed, mean, rstd = layer_norm_ref(x)
    mean = mean.flatten() if given else None
    return dxhat, x if given else normed, mean, rstd.flatten(), dres, torch.full_like(x, float("nan"))


def _gelu(draw: _Draw, D: int, tanh: int) -> tuple[Any, ...]:
    M = draw.images * TOKENS
    derivative = draw.unwritten(M, D, dtype=derivative_dtype(draw.dtype))
    return draw(1, M, D), draw(D, dtype=draw.wide), bool(tanh), draw.unwritten(1, M, D), derivative


def _dgelu(draw: _Draw, D: int) -> tuple[Any, ...]:
    M = draw.images * TOKENS
    return draw(1, M, D), draw.derivative(M, D)


def _linear_gelu(draw: _Draw, N: int, K: int, tanh: int) -> tuple[Any, ...]:
    M = draw.images * TOKENS
    derivative = draw.unwritten(M, N, dtype=derivative_dtype(draw.dtype))
    bias = draw(N, dtype=draw.wide)
    return draw(M, K), draw(N, K) / K**0.5, bias, bool(tanh), draw.unwritten(M, N), derivative


def _linear_dgelu(draw: _Draw, K: int, N: int) -> tuple[Any, ...]:
    M = draw.images * TOKENS
    return draw(M, K), draw(K, N) / K**0.5, draw.derivative(M, N), draw.unwritten(M, N)


HEADS = 6


def _attention(draw: _Draw, N: int, d: int) -> tuple[Any, ...]:
    return draw(draw.images, N, 3, HEADS, d), d**-0.5, draw.unwritten(draw.images, N, HEADS, d)


def _attention_dqkv(draw: _Draw, N: int, d: int) -> tuple[Any, ...]:
    B = draw.images
    return draw(B, N, 3, HEADS, d), draw(B, N, HEADS, d), d**-0.5, draw.unwritten(B, N, 3, HEADS, d)


def _patch_project(draw: _Draw, p: int, K: int, complement: int) -> tuple[Any, ...]:
    shape = (draw.images, K // p**2, 8 * p, 8 * p)  # 8 x 8 patches
    basis = torch.linalg.qr(draw(K, max(1, K // 3), dtype=torch.float32)).Q.contiguous()
    return draw(*shape), basis, p, bool(complement), draw(*shape), draw.unwritten(*shape)


def _objective(draw: _Draw, K: int) -> tuple[Any, ...]:
    B = draw.images
    outputs = (draw.unwritten(*shape, dtype=draw.wide) for shape in ((B,), (B, K), (B,)))
    return draw(B, K), draw(B, K), False, 1.0 / B, *outputs


def _objective_means(draw: _Draw, K: int) -> tuple[Any, ...]:
    return *_objective(draw, K), draw.unwritten(1, dtype=draw.wide), draw.unwritten(1, dtype=draw.wide)


def _steps(draw: _Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise, gradients, gates (-1, 0 and 1 in turn) and step sizes."""
    M = draw.images
    noise, grad = draw(M, TOKENS * 384, dtype=draw.wide), draw(M, TOKENS * 384)
    gate = torch.arange(M, device=noise.device).remainder(3).sub(1).to(torch.float32)
    return noise, grad, gate, torch.full((M,), 0.1, dtype=torch.float64, device=noise.device)


def _adamw(draw: _Draw) -> tuple[Any, ...]:
    noise, grad, gate, lr = _steps(draw)
    moments = (draw(*noise.shape, dtype=draw.wide), draw(*noise.shape, dtype=draw.wide).square())
    steps = torch.full((len(noise),), 3, dtype=torch.int64, device=noise.device)
    return noise, grad, *moments, steps, gate, lr, 0.9, 0.999, 1e-8, 0.01


def _direct(draw: _Draw, sign: int) -> tuple[Any, ...]:
    return *_steps(draw), bool(sign)


_ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "layer_norm_out": _layer_norm,
    "layer_norm_dx_out": _layer_norm_dx,
    "gelu_out": _gelu,
    "dgelu_": _dgelu,
    "linear_gelu_out": _linear_gelu,
    "linear_dgelu_out": _linear_dgelu,
    "attention_out": _attention,
    "attention_dqkv_out": _attention_dqkv,
    "patch_project_out": _patch_project,
    "noise_objective_out": _objective,
    "noise_objective_means_out": _objective_means,
    "adamw_step_": _adamw,
    "direct_step_": _direct,
}
OPS = tuple(_ARGUMENTS)
"""Names of the ops, ordered so that pointwise ops come before the products that use them."""


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.problems: set[Problem] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("fastnull::")
        if name in SIGNATURES:
            self.problems.add(Problem(name, SIGNATURES[name](*args)))
        return func(*args, **(kwargs or {}))


@contextmanager
def traced() -> Iterator[set[Problem]]:
    """Collect the problems of all ops called inside."""
    with _Trace() as trace:
        yield trace.problems
