"""Reading of parts of a shard by offset."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.files import read_span
from ldm.identity import Identity, check_identity

Read = Callable[[int, int, str], bytearray]  # function of offset, size and a name for messages


@contextmanager
def open_spans(path: Path, identity: Identity) -> Iterator[Read]:
    """Open the shard at `path`, which must have `identity`, and yield a function that reads a part of it.

    Raises:
        Replaced: the shard was replaced or changed.
        OSError: it cannot be opened or read.
    """
    # A named pipe in its place would block without O_NONBLOCK.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_identity(descriptor, path, identity)
        yield lambda offset, size, name: read_span(descriptor, offset, size, name)
    finally:
        os.close(descriptor)
