"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against tests/cuda_emulator, as torch.ops.fastnull_emulated.

Objects are kept in build/cuda_emulator under the hash of what they were made of, so only the first run compiles.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC, EMULATOR, BUILD = ROOT / "csrc", ROOT / "tests" / "cuda_emulator", ROOT / "build" / "cuda_emulator"
COMPILER = os.environ.get("CXX", "c++")
# -O1: compiling takes longer than running
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def include_flags() -> list[str]:
    torch_headers = Path(torch.__file__).parent / "include"
    defines = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    return [*defines, f"-I{EMULATOR}", f"-I{CSRC}", "-isystem", str(torch_headers)]


def build(name: str, sources: Iterable[Path]) -> Path:
    """The shared object of these sources, compiled if needed, by one process at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(name, sources)


def _build(name: str, sources: Iterable[Path]) -> Path:
    headers = sorted(p for folder in (CSRC / "cuda", EMULATOR) for p in folder.rglob("*") if p.suffix in (".h", ".cuh"))
    flags = [*FLAGS, *include_flags()]
    common = hashlib.sha256(" ".join([COMPILER, torch.__version__, *flags]).encode())
    for header in headers:
        common.update(header.read_bytes())
    objects = []
    for source in sources:
        key = common.copy()
        key.update(source.read_bytes())
        out = BUILD / f"{source.stem}.{key.hexdigest()[:16]}.o"
        if not out.exists():
            for stale in BUILD.glob(f"{source.stem}.*.o"):
                stale.unlink()
            run([COMPILER, "-x", "c++", *flags, "-c", str(source), "-o", f"{out}.new"])
            Path(f"{out}.new").replace(out)
        objects.append(out)
    key = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = BUILD / f"{name}.{key}.so"
    if not library.exists():
        for stale in BUILD.glob(f"{name}.*.so"):
            stale.unlink()
        lib_dir = Path(torch.__file__).parent / "lib"
        run([COMPILER, "-shared", *map(str, objects), "-o", f"{library}.new", f"-L{lib_dir}", "-ltorch_cpu"])
        Path(f"{library}.new").replace(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@contextmanager
def backwards() -> Iterator[None]:
    """Run the threads of a block from the last to the first."""
    os.environ["FASTNULL_EMULATOR_ORDER"] = "backwards"
    try:
        yield
    finally:
        del os.environ["FASTNULL_EMULATOR_ORDER"]


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(values: Tensor) -> Tensor:
    """A dense copy between NaN and a protected page."""
    size, page = values.numel() * values.element_size(), mmap.PAGESIZE
    pages = (size + page - 1) // page + 1
    memory = mmap.mmap(-1, (pages + 1) * page)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    everything[: pages * page] = 0xFF
    last = ctypes.c_void_p(everything.data_ptr() + pages * page)
    assert _libc.mprotect(last, ctypes.c_size_t(page), 0) == 0, os.strerror(ctypes.get_errno())
    copy = everything[pages * page - size : pages * page].view(values.dtype).view(values.shape)
    return copy.copy_(values)


def guarded_nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that is to be overwritten."""
    return guarded(torch.full(shape, float("nan"), dtype=dtype))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A guarded normal tensor."""
    return guarded(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def load_kernels() -> None:
    """Make torch.ops.fastnull_emulated."""
    sources = [p for p in sorted((CSRC / "cuda").iterdir()) if p.suffix in (".cu", ".cpp")]
    torch.ops.load_library(str(build("kernels", sources)))
