"""How a result was obtained, and writing it so that no reader ever sees half a file."""

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
    """Git commit of the checkout this package runs from, with `+` where it has changes; None outside a checkout."""
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
    """Human name of a device: the GPU's name, or the processor's with the instruction set torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@functools.cache
def _code() -> dict[str, Any]:
    """Commit and versions of what runs."""
    return {
        "fastnull": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "timm": version_of("timm"),
        "python": platform.python_version(),
    }


def provenance(device: torch.device | str = "cpu", **extra: Any) -> dict[str, Any]:
    """What every result file says of itself: commit, versions, device, time, what the caller adds, and on a GPU which
    implementation served each op.

    Commit and versions are those at the first call in this process: it runs what it has loaded, and to ask git takes as
    long as three passes of a small model.
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
    """Yield a temporary path in the same folder; on success it is flushed and renamed over `path`, else removed.

    A reader sees the old file or the whole new one, also after a crash or a full disk. A new file has the mode that the
    umask leaves, a replaced one keeps its own.

    Raises:
        ValueError: at `path` lies something that is no regular file: a link, a device, a pipe, a folder.
    """
    path = Path(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # made by the system's rules for new files (umask, access lists); tempfile's would be for the owner alone
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as made:
        mode = os.fstat(made.fileno()).st_mode
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        if os.path.lexists(path):
            check_replaceable(path)
            mode = path.stat().st_mode
        # who writes may have put another file there, as safetensors does
        os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, path)
    except OSError as error:
        if error.filename is not None:
            raise
        # of a full disk the system does not say which file it was
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def remove_left_over(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of writing `path`: temporary files of `replacing` whose process is gone.

    Those of other machines, other users and live processes stay.
    """
    if os.name != "posix":  # elsewhere there is no harmless way to ask for a process
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
    """Tells machines apart, and containers, whose processes have numbers of their own."""
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
        return True
    return True


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and Inf are refused: they are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False, default=_plain)
    with replacing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no regular file, not JSON, or no table in it; the message names the file.
    """
    check_readable("a record", path)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {os.fspath(path)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)} is no record of fastnull: it holds a {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
