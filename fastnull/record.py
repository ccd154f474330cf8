"""How a result was obtained, and writing it so that no reader ever sees half a file."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastnull import __version__


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


def _version(package: str) -> str | None:
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
        "triton": _version("triton"),
        "timm": _version("timm"),
        "python": platform.python_version(),
    }


def provenance(device: torch.device | str = "cpu", **extra: Any) -> dict[str, Any]:
    """What every result file says of itself: commit, versions, device, time, and what the caller adds.

    Commit and versions are those at the first call in this process: it runs what it has loaded, and to ask git takes as
    long as three passes of a small model.
    """
    return {
        **_code(),
        "device": str(device),
        "device_name": device_name(device),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **extra,
    }


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is flushed and renamed over `path`, else removed.

    A reader sees the old file or the whole new one, also after a crash or a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except OSError as error:
        if error.filename is not None:
            raise
        # of a full disk the system does not say which file it was
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and Inf are refused: they are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False, default=_plain)
    with replacing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
