"""Progress bars: live on a terminal, a line now and then in a log file, and no tqdm where none is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

LOG_INTERVAL = 30.0
"""Seconds between lines where nobody watches."""


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
    """Whether the bars go to a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(total: int | None, *, show: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr; `options` are tqdm's (desc, unit, initial, ...). A silent stand-in unless `show`.

    Without a stderr (2>&-) nothing is shown.
    """
    if not show or sys.stderr is None:
        bar = _Silent(options.get("desc", ""))
        bar.update(options.get("initial", 0))
        return bar
    from tqdm import tqdm

    seconds = 0.1 if watched() else LOG_INTERVAL
    return tqdm(total=total, dynamic_ncols=True, mininterval=seconds, maxinterval=max(seconds, 10.0), **options)


class _Silent:
    """What is called on a bar here, showing nothing; see `listening`."""

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

    def refresh(self) -> None: ...

    def close(self) -> None: ...

    def write(self, text: str) -> None: ...

    def set_description(self, text: str, refresh: bool = True) -> None:
        self._description = text

    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None: ...
