"""Progress bars: live on a terminal, occasional lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

LOG_INTERVAL = 30.0
"""Seconds between lines in a log file."""


_listener: ContextVar[Callable[[str, float], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(tell: Callable[[str, float], None]) -> Iterator[None]:
    """Bars that are made inside and not shown call `tell` with their description and by how much they advanced."""
    token = _listener.set(tell)
    try:
        yield
    finally:
        _listener.reset(token)


def watched() -> bool:
    """Whether bars are shown on a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(total: int | None, *, show: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr with tqdm's `options`; a silent one without `show` or without a stderr (2>&-)."""
    if not show or sys.stderr is None:
        bar = _Silent(options.get("desc", ""))
        bar.update(options.get("initial", 0))
        return bar
    from tqdm import tqdm

    seconds = 0.1 if watched() else LOG_INTERVAL
    return tqdm(total=total, dynamic_ncols=True, mininterval=seconds, maxinterval=max(seconds, 10.0), **options)


class _Silent:
    """A bar that shows nothing; see `listening`."""

    disable = True
    total: float | None = None

    def __init__(self, description: str = "") -> None:
        self._description, self._tell = description, _listener.get()

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: float = 1) -> None:
        if self._tell is not None and n:
            self._tell(self._description, n)

    def set_description(self, text: str, **_: Any) -> None:
        self._description = text

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
