"""Interface to the server of a file: its state, parts of it, and all of it."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, NamedTuple, Protocol

from ldm.identity import Identity

HEAD = 512  # bytes of the first request, which are the first header of a tar


class State(NamedTuple):
    """State of a file on a server."""

    identity: Identity
    has_parts: bool  # True if the server gives parts of the file
    head: bytes  # first `HEAD` bytes


class Server(Protocol):
    """Server of one file. Its methods raise `Momentary`, `NotServed`, or `UserError` for other faults."""

    def state(self) -> State: ...

    def read(self, offset: int, size: int) -> tuple[Identity, bytes] | None:
        """Return a part of the file, or None if the server gives no parts."""
        ...

    def save(self, file: BinaryIO) -> Identity:
        """Write the whole file to `file`."""
        ...


def is_versioned(identity: Identity) -> bool:
    """Return False if the server told no version, so that only the size tells versions apart."""
    return identity[1] != identity_from(0, "")[1]


def identity_from(size: int, version: str) -> Identity:
    """Return the identity of a file by its size and by what its server calls its version, such as an `ETag`.

    It has the form of a local file's: a digest of the version stands for the modification time.
    """
    return size, int.from_bytes(hashlib.sha256(version.encode()).digest()[:7], "big"), 0
