"""A lock on a folder, so that only one process writes there."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no locks on non-POSIX systems
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
"""The lock file, which names the process that holds the lock."""

_held: set[int] = set()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock an existing folder for this process; where another process holds the lock, `wait` waits for it.

    The system releases the lock when the process ends. File systems without locks give a warning and no lock.

    Raises:
        ValueError: another process, or another run in this one, holds the lock; the message names the process.
    """
    handle = _acquire(folder, wait)
    if handle is None:
        yield
        return
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        (folder / NAME).unlink(missing_ok=True)  # while locked, so that no other process has it
        os.close(handle)


def check_unlocked(folder: Path) -> None:
    """Raise as `locked` would, without writing."""
    if fcntl is None or not (folder / NAME).exists():
        return
    with open(folder / NAME, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        except OSError:
            pass  # `locked` warns


def _acquire(folder: Path, wait: bool) -> int | None:
    """The locked file; None without support for locks."""
    if fcntl is None:
        return None
    path = folder / NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _in_use(folder) from None
        except OSError as error:
            os.close(handle)
            warnings.warn(f"{folder} cannot be locked ({error}): do not start a second run there", stacklevel=4)
            return None
        try:
            same = os.fstat(handle).st_ino == os.stat(path).st_ino
        except FileNotFoundError:
            same = False
        if same:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # the previous holder removed the file after we opened it: try the new one


def _in_use(folder: Path) -> ValueError:
    try:
        holder = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        holder = ""
    return ValueError(
        f"out {folder} is in use by {holder or 'another process'}: wait until it ends, or give another folder"
    )


def _let_go() -> None:
    """In a forked child: a loader's worker would hold the lock of a parent that was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
