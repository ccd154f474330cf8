"""Builds the native code beside the Python package; the metadata are in pyproject.toml.

Two shared objects, both written against the LibTorch stable ABI, so that one build serves every Python and every torch
from TORCH_TARGET on: `_C_cpu.so` from csrc/cpu and, where nvcc is found, `_C_cuda.so` from csrc/cuda. Neither has a
Python C API: `fastnull/_C.py` loads them with `torch.ops.load_library`.

Every `*_kernel.cpp` of csrc/cpu is compiled once for each processor level, all other sources once. ninja does the work
in build/native, which stays, so that a second build compiles only what changed. MANIFEST.in puts csrc/ into the source
archive, from which `python -m build` makes its wheel.

Environment: FASTNULL_NATIVE=0 (pure Python), FASTNULL_CUDA=0|1 (default: 1 where nvcc is found and csrc/cuda has
sources), TORCH_CUDA_ARCH_LIST, CUDA_HOME, FASTNULL_BUILD_DIR (default build/native), MAX_JOBS, CXX, CXXFLAGS, LDFLAGS.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it was wheel's
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD_DIR = Path(os.environ.get("FASTNULL_BUILD_DIR", ROOT / "build" / "native"))

# The oldest torch the libraries load into: 2.10 is the first with parallel_for in the stable ABI.
TORCH_TARGET = (2, 10)
# sm_90a: Hopper's own instructions. PTX of the last: newer GPUs compile it when they first load the library.
DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0+PTX"

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # a level must not change a formula by fusing it; the kernels say fmadd where they mean it
    "-Wall",
    "-Wextra",
    "-DTORCH_STABLE_ONLY",
]
# Order: from the plainest to the most capable. The run-time choice is in csrc/cpu/dispatch.cpp.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# gcc 12 calls the undefined pass-through operand of its own AVX-512 intrinsics uninitialised.
_QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
_AVX512 = [*_AVX2, *_QUIET, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_LEVELS = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
}
OTHER_LEVELS: dict[str, list[str]] = {"portable": []}


def torch_include_dirs() -> list[Path]:
    import torch

    include = Path(torch.__file__).parent / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


def torch_lib_dir() -> Path:
    import torch

    return Path(torch.__file__).parent / "lib"


def find_ninja() -> str | None:
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja
    except ImportError:
        return None
    return str(Path(ninja.BIN_DIR) / "ninja")


def find_nvcc() -> Path | None:
    """nvcc itself, looked for by hand: torch's own search answers None under a CPU build of torch."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    return Path(found) if found else None


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]


def nvcc_release(nvcc: Path) -> str:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return next((line.strip() for line in text.splitlines() if "release" in line), text.strip())


def missing_tool() -> str | None:
    """What keeps the native code from being built here, in words, or None."""
    if os.environ.get("FASTNULL_NATIVE") == "0":
        return "switched off by FASTNULL_NATIVE=0"
    if sys.platform == "win32":
        return "the C++ code is not ported to Windows"
    if not any(CSRC.glob("cpu/*.cpp")):
        return "csrc/ is not here: the sources are incomplete"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ('{compiler}' is not on PATH; set CXX)"
    if find_ninja() is None:
        return "no ninja (pip install ninja)"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported here (install with --no-build-isolation in an environment that has torch)"
    return None


def cuda_gencode(nvcc: Path) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST; of the default list, what this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    listing = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(listing.split())
    flags = []
    for entry in re.split(r"[;, ]+", asked or DEFAULT_CUDA_ARCHS):
        arch = entry.removesuffix("+PTX").replace(".", "")
        if f"compute_{arch.rstrip('af')}" not in known:
            if asked:
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is unknown to {nvcc}; it knows {sorted(known)}")
            continue
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


class NinjaFile:
    """The text of a build.ninja: three rules, one edge a file."""

    def __init__(self) -> None:
        self._lines = [
            "ninja_required_version = 1.5",
            f"builddir = {BUILD_DIR}",
            "rule cxx",
            "  command = $compiler -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule nvcc",  # keeps the report on registers and spills, which a test reads
            "  command = $compiler -MD -MF $out.d $flags -Xptxas -v -c $in -o $out > $out.ptxas.txt 2>&1"
            " || { cat $out.ptxas.txt; exit 1; }",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
            "rule link",
            "  command = $compiler -shared $in -o $out $flags",
            "  description = link $out",
        ]

    def add(self, rule: str, out: Path, inputs: list[Path], compiler: str, flags: list[str]) -> Path:
        escape = [str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for p in [out, *inputs]]
        self._lines += [
            f"build {escape[0]}: {rule} {' '.join(escape[1:])}",
            f"  compiler = {compiler}",
            f"  flags = {shlex.join(flags).replace('$', '$$')}",
        ]
        return out

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self._lines) + "\n")


class NativeBuild:
    """Plans and runs the build of `_C_cpu.so` and `_C_cuda.so` in BUILD_DIR."""

    def __init__(self) -> None:
        import torch

        self.compiler = os.environ.get("CXX", "c++")
        self.user_cxx_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.user_ld_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        major, minor = TORCH_TARGET
        self.defines = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"]
        self.includes = [f"-I{CSRC}", *(f for d in torch_include_dirs() for f in ("-isystem", str(d)))]
        self.ninja = NinjaFile()
        self.info: dict[str, Any] = {
            "torch_headers": torch.__version__,
            "torch_minimum": ".".join(map(str, TORCH_TARGET)),
            "machine": platform.machine(),
            "compiler": first_line([*shlex.split(self.compiler), "--version"]),
        }

    def _link_flags(self) -> list[str]:
        if sys.platform == "darwin":
            return ["-undefined", "dynamic_lookup", *self.user_ld_flags]
        return [f"-L{torch_lib_dir()}", "-ltorch_cpu", *self.user_ld_flags]

    def plan_cpu(self) -> Path:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = X86_LEVELS if x86 else OTHER_LEVELS
        common = [*CXX_FLAGS, *self.defines, *self.includes]
        macros = [f"-DFASTNULL_HAS_{level.upper()}" for level in levels]
        objects = []
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernel"):
                for level, level_flags in levels.items():
                    flags = [*common, *level_flags, f"-DFASTNULL_LEVEL={level}", *self.user_cxx_flags]
                    out = BUILD_DIR / "cpu" / f"{source.stem}.{level}.o"
                    objects.append(self.ninja.add("cxx", out, [source], self.compiler, flags))
            else:
                flags = [*common, *macros, *self.user_cxx_flags]
                out = BUILD_DIR / "cpu" / f"{source.stem}.o"
                objects.append(self.ninja.add("cxx", out, [source], self.compiler, flags))
        self.info["cpu"] = {"levels": list(levels), "flags": shlex.join([*CXX_FLAGS, *self.user_cxx_flags])}
        flags = [*self._link_flags(), *self.user_cxx_flags]
        return self.ninja.add("link", BUILD_DIR / "_C_cpu.so", objects, self.compiler, flags)

    def plan_cuda(self) -> Path | None:
        sources = sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")])
        asked = os.environ.get("FASTNULL_CUDA")
        nvcc = find_nvcc()
        reasons = {
            "switched off by FASTNULL_CUDA=0": asked == "0",
            "csrc/cuda is empty": not sources,
            "no nvcc was found (set CUDA_HOME)": nvcc is None,
        }
        missing = next((reason for reason, holds in reasons.items() if holds), None)
        if missing:
            if asked == "1":
                raise SystemExit(f"FASTNULL_CUDA=1, but {missing}")
            print(f"fastnull: the CUDA kernels in C++ are not built: {missing}. GPUs run the Triton kernels.")
            self.info["cuda"] = {"missing": missing}
            return None
        home = nvcc.resolve().parent.parent
        gencode = cuda_gencode(nvcc)
        cxx_flags = [*CXX_FLAGS, *self.defines, *self.includes, "-isystem", str(home / "include"), *self.user_cxx_flags]
        # Kernels know nothing of torch: its headers are for the binding alone.
        nvcc_flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode, f"-I{CSRC}"]
        objects = []
        for source in sources:
            out = BUILD_DIR / "cuda" / f"{source.name}.o"
            if source.suffix == ".cu":
                objects.append(self.ninja.add("nvcc", out, [source], str(nvcc), nvcc_flags))
            else:
                objects.append(self.ninja.add("cxx", out, [source], self.compiler, cxx_flags))
        self.info["cuda"] = {"nvcc": nvcc_release(nvcc), "flags": shlex.join(gencode)}
        flags = [*self._link_flags(), f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return self.ninja.add("link", BUILD_DIR / "_C_cuda.so", objects, self.compiler, flags)

    def run(self) -> list[Path]:
        """Build what can be built. CUDA kernels that do not compile stop the build only where they were asked for."""
        cpu, cuda = self.plan_cpu(), self.plan_cuda()
        self.ninja.write(BUILD_DIR / "build.ninja")
        if not self._make(cpu):
            raise SystemExit("the native build failed (above); FASTNULL_NATIVE=0 installs the package without it")
        if cuda is None or self._make(cuda):
            return [path for path in (cpu, cuda) if path is not None]
        if os.environ.get("FASTNULL_CUDA") == "1":
            raise SystemExit("the CUDA build failed (above); without FASTNULL_CUDA=1 it is left out")
        missing = "nvcc could not compile them (above; perhaps it does not take this C++ compiler)"
        print(f"fastnull: the CUDA kernels in C++ are not built: {missing}. GPUs run the Triton kernels.")
        self.info["cuda"] = {"missing": missing}
        return [cpu]

    def _make(self, target: Path) -> bool:
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(find_ninja()), *jobs, "-f", str(BUILD_DIR / "build.ninja"), str(target)]
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


class BuildNative(build_ext):
    """`build_ext` that leaves the work to ninja and puts libraries and build record beside the package."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT if in_place else Path(self.build_lib)) / "fastnull"
        target.mkdir(parents=True, exist_ok=True)
        missing, libraries = missing_tool(), []
        if missing is None:
            build = NativeBuild()
            libraries = build.run()
            for library in libraries:
                # Copied beside and renamed: a running process may have the old file mapped.
                shutil.copy2(library, target / f".{library.name}.new")
                (target / f".{library.name}.new").replace(target / library.name)
                # fastnull/_C.py loads no other file
                part = build.info[library.stem.removeprefix("_C_")]
                part["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
            info = build.info
        else:
            print(f"fastnull: native code is not built: {missing}. The package works without it, slower.")
            info = {"missing": missing}
        for stale in {"_C_cpu.so", "_C_cuda.so"} - {library.name for library in libraries}:
            (target / stale).unlink(missing_ok=True)
        (target / "_build.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        target = Path(self.build_lib) / "fastnull"
        return [str(p) for p in (*sorted(target.glob("_C_*.so")), target / "_build.json") if p.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """One wheel for all Pythons: the libraries have no Python C API."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, plat = super().get_tag()
        return "py3", "none", plat if missing_tool() is None else "any"


setup(
    packages=[*find_packages(include=["fastnull", "fastnull.*"]), "fastnull.kernels"],
    package_dir={"fastnull": "fastnull", "fastnull.kernels": "kernels"},
    package_data={"fastnull": ["py.typed"]},
    ext_modules=[Extension("fastnull._C_cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
