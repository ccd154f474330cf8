"""The ops of fastnull.ops at the shapes of the models' blocks, against torch's own way to the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention import sdpa
from benchmarks.baselines import LR
from benchmarks.common import Case, Variant, copies_for, dtypes
from benchmarks.models import make_model
from benchmarks.work import ViTShape, Work
from fastnull import ops
from fastnull.bench import BenchSettings
from fastnull.selftest import prove
from fastnull.selftest.problems import Problem, traced
from fastnull.vit import split


def cases(settings: BenchSettings) -> Iterator[Case]:
    """Every op at the shapes of every model; on a GPU by the implementation that the self-test chose."""
    if torch.device(settings.device).type == "cuda":
        prove(problems(settings), torch.empty(0, device=settings.device).device)
    yield from _cases(settings)


def problems(settings: BenchSettings) -> set[Problem]:
    """What the cases ask of the ops."""
    with traced() as found:
        for case in _cases(replace(settings, batch=1)):
            for variant in case.variants:
                if variant.backend == "fastnull":
                    variant.call(0)
    return found


def _cases(settings: BenchSettings) -> Iterator[Case]:
    for name in settings.models:
        shape = ViTShape.of(split(make_model(name, settings)))
        for build in (
            _layer_norm,
            _layer_norm_dx,
            _gelu_pass,
            _dgelu_pass,
            _gelu,
            _dgelu,
            _attention,
            _attention_dqkv,
            _objective,
            _adamw,
        ):
            yield build(name, shape, settings)


class _Inputs:
    """Random float64 inputs of one op, rounded to the narrowest dtype measured and handed out in any, `copies` sets."""

    def __init__(self, settings: BenchSettings, **shapes: tuple[int, ...]) -> None:
        source = torch.Generator(settings.device).manual_seed(settings.seed)
        narrow = min(dtypes(settings), key=lambda dtype: dtype.itemsize)
        numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
        self.copies = copies_for(4 * numbers, settings.device)
        made = {"generator": source, "device": settings.device}
        self.sets = [
            {k: torch.randn(s, **made).to(narrow).double() for k, s in shapes.items()} for _ in range(self.copies)
        ]

    def __call__(self, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        return [{name: tensor.to(dtype) for name, tensor in one.items()} for one in self.sets]


Make = Callable[[dict[str, Tensor]], Callable[[], Tensor]]
"""Takes a set of inputs and returns the call."""


def _case(
    op: str,
    model: str,
    settings: BenchSettings,
    inputs: _Inputs,
    ours: Make,
    torchs: Make,
    work: Callable[[int], Work],
) -> Case:
    """Torch's call in float64 is the reference."""
    variants = []
    for dtype in dtypes(settings):
        sets = inputs(dtype)
        mine, theirs = [ours(one) for one in sets], [torchs(one) for one in sets]
        variants.append(Variant("torch", dtype, lambda i, calls=theirs: calls[i](), library=True))
        variants.append(Variant("fastnull", dtype, lambda i, calls=mine: calls[i](), graph=True, twice=True))
    sizes = ", ".join(f"{name} {list(t.shape)}" for name, t in inputs.sets[0].items())
    return Case(
        "ops", f"{op} {model}", "call", sizes.replace(" [", "["), variants, ("torch", dtypes(settings)[0]),
        reference=lambda: torchs(inputs.sets[0])(), work=lambda dtype: work(dtype.itemsize), copies=inputs.copies,
    )  # fmt: skip


def _layer_norm(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    M, D = settings.batch * s.N, s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: ops.layer_norm_stats(t["x"])[0]

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: F.layer_norm(t["x"], (D,), eps=1e-6)

    return _case(
        "layer_norm",
        model,
        settings,
        _Inputs(settings, x=(M, D)),
        ours,
        torchs,
        lambda b: Work(8 * M * D, 2 * M * D * b),
    )


def _layer_norm_dx(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    M, D = settings.batch * s.N, s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        _, mean, rstd = ops.layer_norm_stats(t["x"])
        return lambda: ops.layer_norm_dx(t["dy"], t["x"], mean, rstd, t["dres"])

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        _, mean, rstd = torch.native_layer_norm(t["x"], (D,), None, None, 1e-6)
        backward = torch.ops.aten.native_layer_norm_backward
        return lambda: t["dres"] + backward(t["dy"], t["x"], (D,), mean, rstd, None, None, [True, False, False])[0]

    inputs = _Inputs(settings, x=(M, D), dy=(M, D), dres=(M, D))
    return _case("layer_norm_dx", model, settings, inputs, ours, torchs, lambda b: Work(10 * M * D, 4 * M * D * b))


def _gelu_pass(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    """Bias, GELU and its derivative alone, not in place: over itself the input would fade call by call."""
    M, D = settings.batch * s.N, 4 * s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        z, bias = t["z"].view(1, M, D), t["b"].to(torch.promote_types(t["b"].dtype, torch.float32))
        h, derivative = torch.empty_like(z), torch.empty_like(z, dtype=ops.derivative_dtype(z.dtype))

        def call() -> Tensor:
            torch.ops.fastnull.gelu_out(z, bias, False, h, derivative)
            return h.view(M, D)

        return call

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: F.gelu(t["z"] + t["b"])

    return _case(
        "gelu", model, settings, _Inputs(settings, z=(M, D), b=(D,)), ours, torchs,
        lambda b: Work(0, M * D * (2 * b + (1 if b == 2 else b))),
    )  # fmt: skip


def _dgelu_pass(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    """The gradient times a kept derivative of 1, in place, so that it stays what it is."""
    M, D = settings.batch * s.N, 4 * s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        derivative = torch.empty_like(t["g"], dtype=ops.derivative_dtype(t["g"].dtype))
        ops.gelu_(torch.full_like(t["g"], 20.0), derivative=derivative)
        return lambda: ops.dgelu_(t["g"], derivative)

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        z = torch.full_like(t["g"], 20.0)
        return lambda: torch.ops.aten.gelu_backward(t["g"], z)

    return _case(
        "dgelu", model, settings, _Inputs(settings, g=(M, D)), ours, torchs,
        lambda b: Work(0, M * D * (2 * b + (1 if b == 2 else b))),
    )  # fmt: skip


def _gelu(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    M, D = settings.batch * s.N, s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        w = t["w"] / D**0.5
        return lambda: ops.linear_gelu_derivative(t["x"], w, t["b"])[0]

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        w = t["w"] / D**0.5
        return lambda: F.gelu(F.linear(t["x"], w, t["b"]))

    inputs = _Inputs(settings, x=(M, D), w=(4 * D, D), b=(4 * D,))
    moved = 5 * M * D + 4 * D * D
    return _case(
        "linear_gelu_derivative", model, settings, inputs, ours, torchs,
        lambda b: Work(8 * M * D * D, moved * b + 4 * M * D * (1 if b == 2 else b)),
    )  # fmt: skip


def _dgelu(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    M, D = settings.batch * s.N, s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        w, derivative = t["w"] / D**0.5, _derivative(t["z"])
        return lambda: ops.linear_dgelu(t["dy"], w, derivative)

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        w = t["w"] / D**0.5
        return lambda: torch.ops.aten.gelu_backward(t["dy"] @ w, t["z"])

    inputs = _Inputs(settings, dy=(M, D), z=(M, 4 * D), w=(D, 4 * D))
    moved = 5 * M * D + 4 * D * D
    return _case(
        "linear_dgelu", model, settings, inputs, ours, torchs,
        lambda b: Work(8 * M * D * D, moved * b + 4 * M * D * (1 if b == 2 else b)),
    )  # fmt: skip


def _derivative(z: Tensor) -> Tensor:
    """gelu' of z, kept as the encoder keeps it."""
    derivative = torch.empty_like(z, dtype=ops.derivative_dtype(z.dtype))
    ops.gelu_(z.clone(), derivative=derivative)
    return derivative


def _attention(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    B, N, D = settings.batch, s.N, s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: ops.attention(t["qkv"])

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: sdpa(t["qkv"]).contiguous()

    inputs = _Inputs(settings, qkv=(B, N, 3, s.H, D // s.H))
    return _case(
        "attention", model, settings, inputs, ours, torchs, lambda b: Work(4 * B * N * N * D, 4 * B * N * D * b),
    )  # fmt: skip


def _attention_dqkv(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    B, N, D = settings.batch, s.N, s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: ops.attention_dqkv(t["qkv"], t["do"])

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        leaf = t["qkv"].clone().requires_grad_(True)
        out = sdpa(leaf)
        return lambda: torch.autograd.grad(out, leaf, t["do"], retain_graph=True)[0]

    inputs = _Inputs(settings, qkv=(B, N, 3, s.H, D // s.H), do=(B, N, s.H, D // s.H))
    return _case(
        "attention_dqkv", model, settings, inputs, ours, torchs, lambda b: Work(10 * B * N * N * D, 7 * B * N * D * b),
    )  # fmt: skip


def _objective(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    B, C = settings.batch, s.C

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: ops.noise_objective(t["clean"], t["noisy"]).cotangent

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            wide = torch.promote_types(t["noisy"].dtype, torch.float32)
            noisy = t["noisy"].to(wide).requires_grad_(True)
            (noisy.softmax(-1) - t["clean"].to(wide).softmax(-1)).square().sum(-1)  # the influence
            return torch.autograd.grad((noisy - t["clean"]).norm(dim=1).mean(), noisy)[0]

        return call

    inputs = _Inputs(settings, clean=(B, C), noisy=(B, C))
    return _case("noise_objective", model, settings, inputs, ours, torchs, lambda b: Work(0, B * C * (2 * b + 4)))


def _adamw(model: str, s: ViTShape, settings: BenchSettings) -> Case:
    N, D = s.N - 1, s.D

    def ours(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        noise = t["noise"].float() if t["noise"].dtype != torch.float64 else t["noise"].clone()
        state = ops.AdamWState.zeros(noise)

        def call() -> Tensor:
            ops.adamw_step(noise, t["grad"], state, lr=LR)
            return noise

        return call

    def torchs(t: dict[str, Tensor]) -> Callable[[], Tensor]:
        wide = torch.promote_types(t["noise"].dtype, torch.float32)
        noise = torch.nn.Parameter(t["noise"].to(wide, copy=True))
        noise.grad = t["grad"].to(wide)
        optimizer = torch.optim.AdamW([noise], lr=LR, weight_decay=0.0)

        def call() -> Tensor:
            optimizer.step()
            return noise

        return call

    inputs = _Inputs(settings, noise=(1, N, D), grad=(1, N, D))
    return _case("adamw_step", model, settings, inputs, ours, torchs, lambda b: Work(0, N * D * (6 * 4 + b)))


def test_ops(benchmark: Any, variant: Variant) -> None:
    """pytest-benchmark's view of a variant."""
    benchmark(variant.call, 0)
