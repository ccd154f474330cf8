"""Checks of input and output paths: only regular files, and no output that replaces an input."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

DATA_PARTS = ("train", "val", "validation", "test")
"""Folders of a data set with its images."""

StrPath = str | os.PathLike[str]


def check_readable(name: str, path: StrPath) -> None:
    """Raise ValueError if `path` is not a regular file, a folder or a link to one: reading a named pipe could block."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # missing or not accessible: opening it raises a clear error
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{name} must be a regular file or a folder; {os.fspath(path)} is {_kind(mode)}")


def same_setting(one: object, other: object) -> bool:
    """Whether two values are equal, or two paths of the same file or folder."""
    if isinstance(one, str) and isinstance(other, str):
        return os.path.realpath(one) == os.path.realpath(other)
    return one == other


def check_replaceable(path: StrPath) -> None:
    """Raise ValueError if `path` exists and is not a regular file: renaming would replace a device, pipe or link."""
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
    """Check the output path of a command before it starts.

    Args:
        out: the file, or with `files` the folder.
        inputs: option → files and folders that the command reads; missing ones are ignored.
        name: of the option for `out`, in messages.
        files: patterns of files that are written or removed in the folder, such as "state-*.pt".

    Raises:
        ValueError: the path is taken by something other than a regular file (or folder); it contains `..` after a
            missing folder; an input would be replaced (also through another spelling, a link or a hard link); it is or
            contains a folder of inputs; or it is among images that are read.
    """
    out = Path(out)
    ups = [count for count, part in enumerate(out.parts, 1) if part == ".."]
    if ups and not Path(*out.parts[: ups[-1]]).exists():
        # once the folder is created this may be an existing file, which was not checked
        raise ValueError(f"{name} {out} leads back (..) out of a folder that does not exist: remove that part")
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
    """Raise ValueError if writing `targets` in or at `out` would replace an input of `option`."""
    if not source.exists():
        return
    here, there = out.resolve(), source.resolve()
    if source.is_dir():
        parts = [there / part for part in DATA_PARTS]
        if here == there or here in there.parents:
            raise ValueError(f"{name} {out} contains the folder that {option} reads ({source}): choose another one")
        if any(part == here or part in here.parents for part in parts) or (here.is_file() and there in here.parents):
            raise ValueError(f"{name} {out} is inside the data that {option} reads ({source}): choose another place")
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
