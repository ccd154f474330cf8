"""Progress bars: live on a terminal, occasional lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

LOG_INTERVAL = 30.0
"""Seconds between lines in a log file."""


def watched() -> bool:
    """Whether bars are shown on a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(total: int | None, *, show: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr with tqdm's `options`; a silent one without `show` or without a stderr (2>&-)."""
    if not show or sys.stderr is None:
        return _Silent()
    from tqdm import tqdm

    seconds = 0.1 if watched() else LOG_INTERVAL
    return tqdm(total=total, dynamic_ncols=True, mininterval=seconds, maxinterval=max(seconds, 10.0), **options)


class _Silent:
    """A bar whose methods do nothing."""

    disable = True
    total: float | None = None

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
