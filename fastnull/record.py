"""Provenance of results, and atomic writing of files."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastnull import __version__, choices
from fastnull.paths import check_readable, check_replaceable


def commit() -> str | None:
    """Git commit of the checkout that this package runs from, with `+` if it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


def _git(root: Path, *args: str) -> str:
    run = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True)
    return run.stdout.strip()


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device | str) -> str:
    """Name of the GPU, or the processor type with the instruction set that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@functools.cache
def _code() -> dict[str, Any]:
    """Commit and versions of the running code."""
    return {
        "fastnull": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "timm": version_of("timm"),
        "python": platform.python_version(),
    }


def provenance(device: torch.device | str = "cpu", **extra: Any) -> dict[str, Any]:
    """Provenance of a result: commit, versions, device, time, the caller's `extra`, and on a GPU the implementation of
    each op.

    Commit and versions are read once per process: calling git takes as long as three passes of a small model.
    """
    return {
        **_code(),
        "device": str(device),
        "device_name": device_name(device),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **choices.in_records(),
        **extra,
    }


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is flushed and renamed to `path`, otherwise removed.

    Readers see the old file or the complete new one, even after a crash or a full disk. A new file has the mode given
    by the umask, a replaced one keeps its mode.

    Raises:
        ValueError: `path` exists and is not a regular file.
    """
    path = Path(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # follows the umask and access lists; a file of tempfile would be readable by the owner only
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as made:
        mode = os.fstat(made.fileno()).st_mode
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        if os.path.lexists(path):
            check_replaceable(path)
            mode = path.stat().st_mode
        # the writer may have replaced the file, as safetensors does
        os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, path)
    except OSError as error:
        if error.filename is not None:
            raise
        # for a full disk the system does not name the file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def remove_left_over(path: str | os.PathLike[str]) -> None:
    """Remove temporary files of `replacing` for `path` whose process was killed.

    Files of other machines, other users and live processes are kept.
    """
    if os.name != "posix":  # elsewhere a process cannot be queried safely
        return
    path = Path(path)
    ours = re.compile(rf"\.{re.escape(path.name)}\.{_machine()}-([0-9]+)-[0-9a-f]{{8}}\.tmp")
    for beside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = ours.fullmatch(beside.name)
        if found is None or _is_alive(int(found[1])):
            continue
        about = os.lstat(beside)
        if stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid():
            beside.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """A hash that identifies the machine or container, which has its own process ids."""
    try:
        numbering = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        numbering = 0
    return hashlib.blake2b(f"{platform.node()}/{numbering}".encode(), digest_size=3).hexdigest()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and Inf are not JSON and raise an error."""
    text = json.dumps(value, indent=2, allow_nan=False, default=_plain)
    with replacing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file, not JSON, or not an object.
    """
    check_readable("a record", path)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {os.fspath(path)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)} is not a record of fastnull: it holds a {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
