"""What may be read and written: regular files, and no output that is an input of the same command."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

DATA_PARTS = ("train", "val", "validation", "test")
"""Folders of a data set that hold its images."""

StrPath = str | os.PathLike[str]


def check_readable(name: str, path: StrPath) -> None:
    """Raise ValueError where at `path` lies something that is neither a regular file nor a folder, nor a link to one.

    To read a named pipe would wait for its writer, maybe for ever.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing there, or nothing that can be looked at: who opens it says so
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{name} must be a regular file or a folder; {os.fspath(path)} is {_kind(mode)}")


def check_replaceable(path: StrPath) -> None:
    """Raise ValueError where a file cannot be written at `path`: something lies there that is no regular file.

    A rename would put a file in place of a device, a pipe or a link, whoever else uses it.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ValueError(f"{os.fspath(path)} cannot be written: a part of its path is a file") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{os.fspath(path)} cannot be written: it is {_kind(mode)}, not a regular file")


def check_output(
    out: StrPath,
    inputs: Mapping[str, StrPath | Sequence[StrPath] | None],
    *,
    name: str = "--out",
    files: Sequence[str] | None = None,
) -> None:
    """Check where a command writes before it does any work.

    Args:
        out: the file, or with `files` the folder.
        inputs: what the command reads, by the name of the option: files and folders; what does not exist is passed.
        name: of the option for `out`, in messages.
        files: patterns of what is written or removed in the folder, such as "state-*.pt".

    Raises:
        ValueError: something is in the way that is no regular file (or no folder, for one); a way back (..) out of a
            folder that is not there; an input would be replaced (told by the file itself, so other spellings, links
            and hard links count); a folder of inputs is the folder that is written to, or lies in it; or what is
            written would lie among images that are read.
    """
    out = Path(out)
    ups = [count for count, part in enumerate(out.parts, 1) if part == ".."]
    if ups and not Path(*out.parts[: ups[-1]]).exists():
        # once the folder is made this may be a file that is there, and that no check has seen
        raise ValueError(f"{name} {out} leads back out of a folder that is not there: leave that out of it")
    above = next((parent for parent in out.absolute().parents if os.path.lexists(parent)), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{name} {out} cannot be made: {above} is a file, not a folder")
    if files is None:
        if out.is_dir():
            raise ValueError(f"{name} must be a file; {out} is a folder")
        targets = [out]
    else:
        if os.path.lexists(out) and not out.is_dir():
            raise ValueError(f"{name} must be a folder; {out} is {_kind(os.lstat(out).st_mode)}")
        targets = [found for pattern in files for found in sorted(out.glob(pattern))]
    for target in targets:
        if not target.is_dir() or target.is_symlink():
            check_replaceable(target)
    for option, given in inputs.items():
        for source in (given,) if isinstance(given, (str, os.PathLike)) else given or ():
            _check_apart(name, out, targets, option, Path(source))


def _check_apart(name: str, out: Path, targets: Sequence[Path], option: str, source: Path) -> None:
    """Raise ValueError where writing `targets` in or at `out` would touch what `option` reads."""
    if not source.exists():
        return
    here, there = out.resolve(), source.resolve()
    if source.is_dir():
        parts = [there / part for part in DATA_PARTS]
        if here == there or here in there.parents:
            raise ValueError(f"{name} {out} holds the folder that {option} reads ({source}): give another one")
        if any(part == here or part in here.parents for part in parts) or (here.is_file() and there in here.parents):
            raise ValueError(f"{name} {out} lies among what {option} reads ({source}): give another place")
        return
    for target in targets:
        if target.exists() and (os.path.samefile(target, source) or target.resolve() in there.parents):
            raise ValueError(f"{name} {out}: {target} is what {option} reads ({source}); it would be replaced")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    )  # fmt: skip
    return next((words for is_kind, words in kinds if is_kind(mode)), "a file")
