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
"""Name of the lock file, which holds the name of the locking process."""

_held: set[int] = set()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock an existing folder for this process.

    The system releases the lock when the process ends. On file systems without locks it only warns.

    Args:
        folder: the folder to lock.
        wait: wait until the lock is free instead of raising an error.

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
        (folder / NAME).unlink(missing_ok=True)  # before the release, so that no other process holds the file
        os.close(handle)


def check_unlocked(folder: Path) -> None:
    """Raise the error of `locked` if the folder is locked, without writing."""
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
    """File descriptor of the locked file; None if locks are not supported."""
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
        os.close(handle)  # the previous holder removed the file after it was opened here: try again


def _in_use(folder: Path) -> ValueError:
    try:
        holder = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        holder = ""
    return ValueError(
        f"out {folder} is in use by {holder or 'another process'}: wait until it ends, or give another folder"
    )


def _let_go() -> None:
    """Close the handles in a forked child: a DataLoader worker would keep the lock of a killed parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
