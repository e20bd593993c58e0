"""Standard streams whose errors end no program: closed ones, pipes without a reader, logs on a full disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}  # in the order of their descriptors
_PASSING = (errno.ENOSPC, errno.EDQUOT)


class TolerantStream:
    """Text stream that drops what cannot be written. Everything but a full disk ends its output for good."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def finish(self) -> None:
        """Flush, and drop what cannot be written, which would be an error when Python ends."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _fail(self, error: OSError) -> None:
        if error.errno not in _PASSING:
            self._discard()

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Open the standard streams that are closed, and make `sys.stdout` and `sys.stderr` tolerant."""
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (TolerantStream(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TolerantStream):
                stream.finish()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Open what is closed on nothing. Otherwise, a file of the program would get the number, and the messages."""
    for descriptor, (name, mode) in enumerate(_MODES.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
