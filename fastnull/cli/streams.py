"""Standard output and error that a command can write to even if nobody reads them any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lasting_streams() -> Iterator[list[OSError]]:
    """Inside, sys.stdout and sys.stderr never raise: work continues if one is closed or its reader has left.

    Yields:
        A list that at the end holds the error of standard output, if it could not be written. A reader that left
        (`| head -1`) and a stream that was closed from the start (`>&-`) are no errors.
    """
    _fill_closed()
    before = sys.stdout, sys.stderr
    failed: list[OSError] = []
    out, error = (_Lasting(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before)  # noqa: SIM115
    sys.stdout, sys.stderr = out, error
    try:
        yield failed
    finally:
        for stream in (out, error):
            stream.flush()
        sys.stdout, sys.stderr = before
        if out.failed is not None and not isinstance(out.failed, BrokenPipeError):
            failed.append(out.failed)


def _fill_closed() -> None:
    """Open descriptors 0 to 2 if closed: else the next file gets the number, and with it what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            found = os.open(os.devnull, os.O_RDWR)
            if found != number:
                os.dup2(found, number)
                os.close(found)
            os.set_inheritable(number, True)


class _Lasting:
    """A text stream that drops all writes after the first one that fails.

    Attributes:
        failed: the error of that write, or None.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failed: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._do(self._stream.write, text)
        except UnicodeEncodeError as error:  # a terminal that cannot show ± or ε
            self._do(self._stream.write, text.encode(error.encoding, "replace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, call: Callable[..., Any], *args: str) -> None:
        try:
            call(*args)
        except (OSError, ValueError) as error:  # ValueError: the stream object itself was closed
            if isinstance(error, UnicodeError):
                raise
            self.failed = error if isinstance(error, OSError) else OSError(str(error))
            self._drop()

    def _drop(self) -> None:
        """Discard everything from now on: what is left in the stream's buffer would fail again when Python ends."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):  # no file
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process lives)
