"""The native library: its requirements, missing and broken libraries, and the build record."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from fastnull import _C, build_info, ops

ROOT = Path(__file__).resolve().parent.parent
needs_library = pytest.mark.skipif(not _C.cpu.path.exists(), reason="the C++ ops are not built here")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: loading happens once a process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def test_importing_the_package_loads_nothing() -> None:
    done = run("import fastnull.ops; from fastnull import _C; print(_C.cpu.loaded, _C.cpu.error)")
    assert done.stdout.split() == ["False", "None"], done.stderr


def test_switched_off_by_the_environment() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import torch; from fastnull import _C, ops;"
        "print(ops.layer_norm(torch.ones(2, 8)).shape, _C.cpu.error, _C.cpu_levels())"
    )
    done = run(code, FASTNULL_NATIVE="0")
    assert "switched off by FASTNULL_NATIVE=0 []" in done.stdout, done.stderr


@needs_library
def test_level_from_the_environment() -> None:
    done = run("from fastnull import _C; print(_C.cpu_level())", FASTNULL_CPU_LEVEL="portable")
    assert done.stdout.strip() == "portable", done.stderr
    done = run("from fastnull import _C; print(_C.cpu_level())", FASTNULL_CPU_LEVEL="sse9")
    assert "the CPU level must be one of portable" in done.stderr


@needs_library
def test_levels_are_forced_and_restored() -> None:
    before = _C.cpu_level()
    assert before == _C.cpu_levels()[-1] or before in _C.cpu_levels()
    with _C.forced_cpu_level("portable"):
        assert _C.cpu_level() == "portable"
    assert _C.cpu_level() == before
    with pytest.raises(ValueError, match="got 'sse9'"):
        _C.set_cpu_level("sse9")
    with _C.disabled(), pytest.raises(RuntimeError, match="no C\\+\\+ ops"):
        _C.set_cpu_level("portable")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of libraries in place of the package's."""
    monkeypatch.setattr(_C, "DIRECTORY", tmp_path)
    return tmp_path


def test_a_missing_library_is_quiet_and_explained(folder: Path) -> None:
    (folder / _C.RECORD).write_text(json.dumps({"missing": "no C++ compiler ('c++' is not on PATH; set CXX)"}))
    library = _C.Library("_C_cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.load()
    assert library.error == "not built: no C++ compiler ('c++' is not on PATH; set CXX)"


def record(folder: Path, **rest: object) -> None:
    """Write a build record with the digest of the library."""
    digest = hashlib.sha256((folder / "_C_cpu.so").read_bytes()).hexdigest()
    (folder / _C.RECORD).write_text(json.dumps({"cpu": {"sha256": digest}, **rest}))


def refused(message: str) -> _C.Library:
    """A library that does not load, with one warning and the same error."""
    library = _C.Library("_C_cpu")
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert not library.load()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.load()
    assert library.error
    assert re.search(message, library.error)
    return library


def test_a_broken_library_is_reported_once_with_versions(folder: Path) -> None:
    (folder / "_C_cpu.so").write_bytes(b"not a library")
    record(folder, torch_headers="2.99.0", torch_minimum="2.98")
    refused(r"does not load into torch .* \(built against torch 2\.99\.0")


@needs_library
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_library_is_never_loaded(tmp_path: Path, kept: float) -> None:
    """In a separate process: loading such a file would end it with SIGBUS."""
    for name in ("_C_cpu.so", _C.RECORD):
        shutil.copy(_C.DIRECTORY / name, tmp_path / name)
    whole = _C.cpu.path.read_bytes()
    (tmp_path / "_C_cpu.so").write_bytes(whole[: int(kept * len(whole))])
    code = (
        "import pathlib, torch; from fastnull import _C, ops;"
        f"_C.DIRECTORY = pathlib.Path({str(tmp_path)!r});"
        "print(ops.layer_norm(torch.ones(2, 8)).shape, _C.cpu.loaded)"
    )
    done = run(code)
    assert done.stdout.split() == ["torch.Size([2,", "8])", "False"], done.stderr
    assert "_C_cpu.so is not the file that was built" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no digest to know it by"),
        ("{}", "there is no digest to know it by"),
        ('{"cpu": {"sha256": "00"}}', "not the file that was built"),
        ('{"cpu": "half a rec', r"there is no digest to know it by \(_build.json: "),
        ("[1, 2]", "_build.json is no mapping"),
        ('{"cpu": 3, "missing": 4}', "there is no digest to know it by"),
    ],
)
def test_a_library_of_unknown_digest_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    (folder / "_C_cpu.so").write_bytes(b"whatever")
    if text is not None:
        (folder / _C.RECORD).write_text(text)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("it was loaded"))
    refused(message)


def test_a_library_without_our_kernels_does_not_count_as_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "_C_cpu.so").write_bytes(b"of another package")
    record(folder)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setitem(_C.KERNELS, "_C_cpu", ("CPU", "aten", "mm no_such_op"))
    library = refused("lacks the kernels of no_such_op")
    assert library.error == "_C_cpu.so lacks the kernels of no_such_op"
    # a definition with the reference for every device is no kernel of the library's
    monkeypatch.setitem(_C.KERNELS, "_C_cpu", ("CPU", "fastnull", "linear_gelu_out"))
    refused("lacks the kernels of linear_gelu_out")


@pytest.mark.parametrize("content", [b'{"cpu": ', b"\xff\xfe", b"[]", None])
def test_a_broken_build_record_breaks_nothing(folder: Path, content: bytes | None) -> None:
    if content is None:
        (folder / _C.RECORD).mkdir()
    else:
        (folder / _C.RECORD).write_bytes(content)
    assert "_build.json" in build_info.build_info()["built"]["unreadable"]
    assert _C.Library("_C_cpu").load() is False


def built(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py's build of the native code into a folder, with nothing kept of earlier ones."""
    words = ["setup.py", "--quiet", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    env = {**os.environ, "FASTNULL_BUILD_DIR": str(folder / "native"), **environment}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"CXX": "no-compiler"}, "no C++ compiler ('no-compiler' is not on PATH; set CXX)"),
        ({"FASTNULL_NATIVE": "0"}, "switched off by FASTNULL_NATIVE=0"),
    ],
)
def test_without_a_compiler_one_line_says_what_is_missing(
    tmp_path: Path, environment: dict[str, str], missing: str
) -> None:
    done = built(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "fastnull" in line] == [
        f"fastnull: native code is not built: {missing}. The package works without it, slower."
    ]
    assert json.loads((tmp_path / "fastnull" / "_build.json").read_text()) == {"missing": missing}
    assert not list(tmp_path.glob("fastnull/*.so"))


def test_the_source_archive_holds_what_a_wheel_is_made_from(tmp_path: Path) -> None:
    """`python -m build` makes the wheel from it: without csrc/ that wheel would have no native code."""
    words = ["setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("fastnull-*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    made = {"_build.json", "_C_cpu.so", "_C_cuda.so"}
    for folder in ("csrc", "fastnull", "kernels"):
        files = {path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        needed = {path.relative_to(ROOT).as_posix() for path in files if path.name not in made}
        assert not needed - held


def test_without_the_sources_a_build_says_so(tmp_path: Path) -> None:
    (tmp_path / "fastnull").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastnull/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "native code is not built: csrc/ is not here" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists() and not shutil.which("nvcc"), reason="no nvcc")
def test_an_unknown_architecture_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    done = built(tmp_path, TORCH_CUDA_ARCH_LIST="1.3")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: '1.3' is unknown to" in done.stderr
    assert not list(tmp_path.rglob("*.o"))


FOREIGN = ("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10")
"""Beginnings of Python's symbols and of torch's C++ symbols: without them one build works with several versions."""


def undefined_symbols(library: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--undefined-only", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.strip()]


@needs_library
def test_the_library_needs_only_the_stable_abi() -> None:
    names = undefined_symbols(_C.cpu.path)
    assert not [name for name in names if name.startswith(FOREIGN)]
    assert any(name.startswith("aoti_torch_") for name in names)


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_function_of_one_level_is_shared_with_another() -> None:
    """Weak symbols outside a level's namespace could be the AVX-512 copy of an inline function: there must be none."""
    objects = sorted((ROOT / "build" / "native" / "cpu").glob("*_kernel.*.o"))
    if not objects:
        pytest.skip("built elsewhere")
    for path in objects:
        level = path.name.split(".")[1]
        done = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        weak = [line.split(" ", 2)[2] for line in done.stdout.splitlines() if line.split(" ")[1] in "WV"]
        assert all(f"fastnull::{level}::" in name for name in weak), (path.name, weak)


@needs_library
def test_build_info_names_what_is_built_and_in_use() -> None:
    info = build_info.build_info()
    assert info["torch"] == torch.__version__
    assert info["cpu"]["loaded"]
    assert info["cpu"]["level"] in info["cpu"]["levels"]
    assert info["built"]["compiler"]
    # dot products are a way to run a level, not one that is compiled apart
    assert {level.removesuffix("_dot") for level in info["cpu"]["levels"]} <= set(info["built"]["cpu"]["levels"])
    done = subprocess.run(
        [sys.executable, "-m", "fastnull.build_info"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(done.stdout)["cpu"]["loaded"]


@needs_library
def test_ops_compile_without_a_graph_break() -> None:
    """Dynamo traces the public functions down to the registered ops (backend "eager": no compiler is needed)."""
    x = torch.randn(2, 5, 16)
    ops.layer_norm(x)  # loads the library: that cannot happen while tracing

    def f(t: torch.Tensor) -> torch.Tensor:
        return ops.attention(ops.layer_norm(t).view(2, 5, 1, 2, 8).expand(2, 5, 3, 2, 8))

    torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(x), f(x))
