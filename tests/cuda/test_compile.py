"""The CUDA library built by nvcc: no spills on any architecture, and only the stable ABI of torch."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from fastnull import _C
from tests.cuda.emulated import ROOT
from tests.test_build import FOREIGN, undefined_symbols

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """What setup.py defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: None)
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(scope="module")
def library(setup: dict[str, Any]) -> Path:
    """_C_cuda.so as setup.py builds it, in setup.py's own folder: nothing to do after `make setup`."""
    missing = setup["missing_tool"]()
    if missing:
        pytest.skip(missing)
    build = setup["NativeBuild"]()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        planned = build.plan_cuda()
    if planned is None:
        pytest.skip(build.info["cuda"]["missing"])
    build.ninja.write(setup["BUILD_DIR"] / "cuda.ninja")
    command = [setup["find_ninja"](), "-f", str(setup["BUILD_DIR"] / "cuda.ninja")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return planned


def reports(library: Path) -> list[tuple[str, str, str]]:
    """(kernel, architecture, report of ptxas) of every kernel."""
    found = []
    for path in sorted((library.parent / "cuda").glob("*.ptxas.txt")):
        for part in path.read_text().split("Compiling entry function ")[1:]:
            name, architecture = re.match(r"'(\S+)' for '(\S+)'", part).groups()  # type: ignore[union-attr]
            found.append((name, architecture, part))
    return found


def test_no_kernel_spills(library: Path) -> None:
    found = reports(library)
    for name, architecture, text in found:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, (name, architecture, text)
    assert {architecture for _, architecture, _ in found} == ARCHITECTURES
    sources = {source.name for source in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {path.name.removesuffix(".o.ptxas.txt") for path in (library.parent / "cuda").glob("*.txt")} == sources


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_sm_120_compiles_the_ptx_without_spills(setup: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """The library holds no machine code for it. sm_86 and 89 run that of sm_80."""
    nvcc = setup["find_nvcc"]()
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_100,code=sm_120", "-Xptxas", "-v"]
    command = [str(nvcc), *flags, "-c", str(source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frames = {int(size) for size in re.findall(r"(\d+) bytes stack frame", done.stderr)}
    assert max(frames) <= (32 if source.stem == "patch_project" else 0), done.stderr


def test_the_library_needs_only_the_stable_abi(library: Path) -> None:
    names = undefined_symbols(library)
    assert not [name for name in names if name.startswith((*FOREIGN, "cu"))]
    # in libtorch_cuda, which this library does not link
    assert "aoti_torch_get_current_cuda_stream" not in names


def test_it_loads_and_its_ops_have_the_arguments_of_ours(library: Path) -> None:
    """Into a torch without CUDA too."""
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
import fastnull.ops
from fastnull import _C
for name in _C.KERNELS["_C_cuda"][2].split():
    ours, theirs = (getattr(getattr(torch.ops, ns), name).default._schema for ns in ("fastnull", "fastnull_cuda"))
    ours, theirs = str(ours), str(theirs)
    assert ours.removeprefix("fastnull::") == theirs.removeprefix("fastnull_cuda::"), (ours, theirs)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastnull_cuda::" + name, "CUDA"), name
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "same", done.stderr


def test_without_nvcc_one_line_says_so(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if setup["missing_tool"]():
        pytest.skip(setup["missing_tool"]())
    build = setup["NativeBuild"]()
    monkeypatch.setitem(build.plan_cuda.__func__.__globals__, "find_nvcc", lambda: None)
    monkeypatch.delenv("FASTNULL_CUDA", raising=False)
    assert build.plan_cuda() is None
    output = capsys.readouterr().out
    assert "not built: no nvcc was found (set CUDA_HOME). GPUs run the Triton kernels." in output
    assert output.count("\n") == 1
    assert build.info["cuda"] == {"missing": "no nvcc was found (set CUDA_HOME)"}
    monkeypatch.setenv("FASTNULL_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTNULL_CUDA=1, but no nvcc was found"):
        build.plan_cuda()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_does_not_touch_the_library() -> None:
    library = _C.Library("_C_cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.load()
    assert library.error == f"torch {torch.__version__} is built without CUDA"
