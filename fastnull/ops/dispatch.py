"""Dispatch of ops on CUDA tensors: to the fastest implementation that passed the self-test, else to `library`.

The names of implementations: `library` is torch's own operators, with the layout copies they need, or the reference in
the op's file (on a CPU always the reference); `flash`, `cudnn`, `efficient` and `math` are torch's attention backends;
`triton` is the kernel in kernels/, `cuda` in csrc/cuda, `cpu` in csrc/cpu. FASTNULL_KERNELS=triton or cuda runs these
kernels without the self-test, for testing the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastnull import _C, choices
from fastnull.ops.attention import WIDEST_HEAD, attention_dqkv_sdpa_out, attention_out_sdpa
from fastnull.ops.common import NATIVE_DTYPES, REFERENCES
from fastnull.ops.layer_norm import layer_norm_dx_library, layer_norm_library
from fastnull.ops.linear_gelu import linear_dgelu_apart, linear_gelu_apart

CUDA_NAMESPACE = "fastnull_cuda"
"""Namespace of the ops in csrc/cuda/binding.cpp."""
LIBRARY = "library"
Signature = tuple[torch.dtype, tuple[int, ...]]
Run = Callable[..., None]


def _given(*optional: Tensor | None) -> int:
    """Bit mask of the optional arguments that are given."""
    return sum((each is not None) << place for place, each in enumerate(optional))


SIGNATURES: dict[str, Callable[..., Signature]] = {
    "layer_norm_out": lambda x, weight, bias, shift, eps, y, mean, rstd: (x.dtype, (x.shape[-1], _given(shift, mean))),
    "layer_norm_dx_out": lambda dxhat, x, mean, *_: (x.dtype, (x.shape[-1], _given(mean))),
    "gelu_out": lambda z, bias, tanh, *_: (z.dtype, (z.shape[-1], int(tanh))),
    "dgelu_": lambda g, derivative: (g.dtype, (g.shape[-1],)),
    "linear_gelu_out": lambda x, weight, bias, tanh, *_: (x.dtype, (*weight.shape, int(tanh))),
    "linear_dgelu_out": lambda dy, weight, *_: (dy.dtype, tuple(weight.shape)),
    "attention_out": lambda qkv, *_: (qkv.dtype, (qkv.shape[1], qkv.shape[4])),
    "attention_dqkv_out": lambda qkv, *_: (qkv.dtype, (qkv.shape[1], qkv.shape[4])),
    "patch_project_out": lambda noise, basis, p, complement, *_: (noise.dtype, (p, len(basis), int(complement))),
    "noise_objective_out": lambda clean, noisy, *_: (noisy.dtype, (noisy.shape[1],)),
    "noise_objective_means_out": lambda clean, noisy, *_: (noisy.dtype, (noisy.shape[1],)),
    "adamw_step_": lambda noise, grad, *_: (grad.dtype, ()),
    "direct_step_": lambda noise, grad, gate, lr, sign: (grad.dtype, (int(sign),)),
}
"""Op → function that returns the dtype and sizes that determine its implementation (not the batch size)."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    Attributes:
        run: takes the arguments of `torch.ops.fastnull.<op>`.
        serves: whether it supports these arguments: their dtype, sizes, alignment and the GPU's shared memory.
    """

    run: Run
    serves: Callable[..., bool] = lambda *args: True


def implementations(op: str, device: torch.device, tiles: bool = False) -> dict[str, Implementation]:
    """Name → implementation, for all that are available on a device; always includes `library`.

    With `tiles`, also the Triton kernel with other tiles than those of its table: "triton queries=64,keys=128,warps=8".
    """
    if device.type == "cpu":
        return {LIBRARY: Implementation(REFERENCES[op])} | _cpu(op) | _triton(op, interpreted=True, tiles=tiles)
    found = {LIBRARY: Implementation(_LIBRARY.get(op, REFERENCES[op]))}
    return found | _attentions(op) | _triton(op, interpreted=False, tiles=tiles) | _cuda(op)


def dispatcher(op: str) -> Run:
    """The function to register for an op's CUDA key."""
    signature = SIGNATURES[op]
    known: dict[tuple[bool, torch.device, Signature], list[Implementation]] = {}
    choices.on_change(known.clear)

    def launch(*args: Tensor) -> None:
        key = (choices.library_only(), args[0].device, signature(*args))
        ranked = known.get(key)
        if ranked is None:
            ranked = known[key] = _ranked(op, *key)
        next(each for each in ranked if each.serves(*args)).run(*args)

    return launch


def problem_name(op: str, signature: Signature) -> str:
    """Name of a problem in the results: "attention_out bfloat16 197 64"."""
    dtype, sizes = signature
    return " ".join([op, str(dtype).removeprefix("torch."), *map(str, sizes)])


def _ranked(op: str, library_only: bool, device: torch.device, signature: Signature) -> list[Implementation]:
    """Implementations in the order to try; the last one supports all arguments."""
    problem, here = problem_name(op, signature), implementations(op, device, tiles=True)
    if library_only or choices.mode() == "off":
        names = []
    elif choices.forced():
        names = [choices.forced(), "triton"]
    else:
        names = choices.ranked(_name(device), problem)
    names = [name for name in names if name in here]
    choices.use(problem, names[0] if names else LIBRARY)
    return [here[name] for name in (*names, LIBRARY)]


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _cpu(op: str) -> dict[str, Implementation]:
    if op not in _C.KERNELS["_C_cpu"][2].split() or not _C.cpu_available():
        return {}
    return {
        "cpu": Implementation(
            getattr(torch.ops.fastnull, op), lambda *args: SIGNATURES[op](*args)[0] in NATIVE_DTYPES["cpu"]
        )
    }


def _triton(op: str, interpreted: bool, tiles: bool) -> dict[str, Implementation]:
    try:
        from fastnull.kernels import CANDIDATES, LAUNCHERS
        from fastnull.kernels.tiles import change_name, with_change
    except ImportError:
        return {}
    import triton

    if op not in LAUNCHERS or triton.knobs.runtime.interpret != interpreted:
        return {}
    launchers = {"triton": LAUNCHERS[op]}
    for change in CANDIDATES.get(op, ()) if tiles else ():
        launchers[f"triton {change_name(change)}"] = with_change(LAUNCHERS[op], change)
    return {name: Implementation(launcher, _triton_serves(op)) for name, launcher in launchers.items()}


def _triton_serves(op: str) -> Callable[..., bool]:
    if op.startswith("attention"):
        return lambda qkv, *_: qkv.shape[-1] <= WIDEST_HEAD
    if op.startswith("linear"):
        return lambda x, *_: x.dtype.itemsize == 2
    return lambda *args: True


def _cuda(op: str) -> dict[str, Implementation]:
    if op not in _C.KERNELS["_C_cuda"][2].split() or not _C.cuda.load():
        return {}
    serves = {"attention_out": _cuda_attends, "attention_dqkv_out": _cuda_attends}.get(op, lambda *args: True)
    return {"cuda": Implementation(getattr(getattr(torch.ops, CUDA_NAMESPACE), op), serves)}


CUDA_TOKENS = (64, 80, 208, 272)
"""Numbers of tokens that attention.cu and attention_dqkv.cu are compiled for; others are padded to the next one."""


def _cuda_attends(qkv: Tensor, *rest: object) -> bool:
    """Whether csrc/cuda's attention supports these arguments; it keeps all rows of a head in shared memory."""
    tensors = [qkv, *(x for x in rest if isinstance(x, Tensor))]
    padded = next((tokens for tokens in CUDA_TOKENS if tokens >= qkv.shape[1]), None)
    if padded is None or qkv.shape[4] not in (32, 64) or qkv.dtype.itemsize != 2:
        return False
    backward = len(tensors) == 3
    needed = padded * (qkv.shape[4] * 2 * (4 if backward else 3) + (8 if backward else 0))
    return needed <= shared_memory(qkv.device) and all(_reads_in_16_bytes(x) for x in tensors)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Maximum bytes of shared memory per block: 99 KB on sm_86, 89 and 120, 227 KB on sm_90."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _reads_in_16_bytes(x: Tensor) -> bool:
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])


_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CUDNN = 91501
"""Oldest cuDNN whose attention has no out-of-bounds reads at lengths not divisible by 128 (pytorch issue 169849)."""


def _attentions(op: str) -> dict[str, Implementation]:
    """Name → each of torch's attention backends."""
    if not op.startswith("attention"):
        return {}
    run = _LIBRARY[op]

    def by(backend: SDPBackend) -> Run:
        def attend(*args: Tensor) -> None:
            with sdpa_kernel(backend):
                run(*args)

        return attend

    def cudnn_serves(*args: object) -> bool:
        return (torch.backends.cudnn.version() or 0) >= CUDNN  # type: ignore[no-untyped-call]

    serves = {"cudnn": cudnn_serves}
    return {n: Implementation(by(b), serves.get(n, lambda *args: True)) for n, b in _SDPA.items()}


_LIBRARY: Mapping[str, Run] = {
    "attention_out": attention_out_sdpa,
    "attention_dqkv_out": attention_dqkv_sdpa_out,
    "layer_norm_out": layer_norm_library,
    "layer_norm_dx_out": layer_norm_dx_library,
    "linear_gelu_out": linear_gelu_apart,
    "linear_dgelu_out": linear_dgelu_apart,
}
"""Ops whose `library` implementation differs from their reference."""
