"""Reading of parts of a shard by offset. The shard is a local file, or one on a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.files import read_span
from ldm.identity import Identity, check_identity, identity_of_path
from ldm.remote.copies import has_copy, local_copy, open_copy, read_part, state_of
from ldm.remote.path import RemotePath, ShardPath
from ldm.util import UserError

Read = Callable[[int, int, str], bytearray]  # function of offset, size and a name for messages
Part = tuple[int, int]  # offset of the first byte, and after the last one

_GAP = 1 << 16  # bytes between two parts that are read at once


@contextmanager
def open_spans(path: ShardPath, identity: Identity, parts: Iterable[Part] | None = None) -> Iterator[Read]:
    """Open the shard at `path`, which must have `identity`, and yield a function that reads a span of it.

    Args:
        parts: all that is read, or None if this is unknown. Of a shard on a server, these parts are read, those that
            lie together at once; or else the whole shard.

    Raises:
        Replaced: the shard was replaced or changed.
        UserError: the server does not give it.
        OSError: it cannot be opened or read.
    """
    if isinstance(path, RemotePath) and parts is not None and not has_copy(path, identity):
        found = [(first, read_part(path, identity, first, last - first)) for first, last in _joined(parts)]
        yield lambda offset, size, name: _span_of(found, offset, size, name)
        return
    if isinstance(path, RemotePath):
        with open_copy(path, identity) as file:
            yield lambda offset, size, name: read_span(file.fileno(), offset, size, name)
        return
    # A named pipe in its place would block without O_NONBLOCK.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_identity(descriptor, path, identity)
        yield lambda offset, size, name: read_span(descriptor, offset, size, name)
    finally:
        os.close(descriptor)


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Return the parts in order. Join those at most `_GAP` bytes apart."""
    joined: list[Part] = []
    for first, last in sorted(parts):
        if joined and first - joined[-1][1] <= _GAP:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def _span_of(parts: Iterable[tuple[int, bytearray]], offset: int, size: int, name: str) -> bytearray:
    """Return a span from one of the parts that were read, each with its offset."""
    for first, data in parts:
        if first <= offset and offset + size <= first + len(data):
            return data[offset - first : offset - first + size]
    raise UserError(f"{name}: the file is truncated; it changed after it was indexed")


def identity_of_shard(path: ShardPath) -> Identity:
    """Return the identity of a shard; zeros if there is no local file, which no file has."""
    return state_of(path).identity if isinstance(path, RemotePath) else identity_of_path(path)


def beside_shards(path: ShardPath) -> Path:
    """Return the path of a file beside shards, such as their index; of one on a server, that of a local copy.

    Raises:
        NotServed: the server has no such file, or does not give it.
    """
    return local_copy(path) if isinstance(path, RemotePath) else path
