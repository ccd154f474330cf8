"""Compile what a launcher launches for GPUs that are not present, and read the resources of the result.

The launcher runs on meta tensors of real sizes while the launch is caught; the caught arguments give the signature and
the specialisation (divisible by 16, equal to 1, None) by Triton's own rules, so what is compiled is what a GPU runs.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TYPES |= {torch.uint8: "u8", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it was launched with."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel: registers a thread, bytes of stack (spills) and of shared memory, its PTX, and
    what Triton makes of it first."""

    registers: int
    stack: int
    shared: int
    ptx: str
    ir: str


def launches_of(call: Callable[[], None]) -> list[Launch]:
    """What `call` launches; nothing is run."""
    launches: list[Launch] = []

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        launches.append(Launch(self, dict(bound.arguments), options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", catch)
        call()
    return launches


def _source(launch: Launch) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        fixed = parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1)
        if fixed:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile for sm_<capability>; TRITON_CACHE_DIR decides where the results are kept."""
    built = triton.compile(_source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    return Compiled(registers, stack, built.metadata.shared, built.asm["ptx"], built.asm["ttir"])
