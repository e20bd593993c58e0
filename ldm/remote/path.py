"""Names of files on servers."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from ldm.printable import redacted

_REMOTE = re.compile(r"(https?|s3|gs)://")
_USER = re.compile(r"(?<=://)[^/@]*@")


class RemotePath:
    """File or folder at a URL, in the places where a local one is a `Path`. Its text is the URL without secrets.

    The files of a folder have the same query, such as the signature of a shared folder.

    Attributes:
        sha256: checksum that the content must have, in hex, or None if it is unknown.
    """

    def __init__(self, url: str, sha256: str | None = None) -> None:
        self.url = url
        self.sha256 = sha256
        before, mark, query = url.partition("?") if url.startswith("http") else (url, "", "")
        self._before, self._query = before.rstrip("/"), mark + query

    @property
    def scheme(self) -> str:
        return self.url.partition(":")[0]

    @property
    def name(self) -> str:
        return unquote(self._before.rpartition("/")[2])

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._before.rpartition("/")[0] + self._query)

    @property
    def digest(self) -> str:
        """Digest of the URL in hex, without user and query, which may change while the file is the same."""
        return hashlib.sha256(_USER.sub("", self._before).encode()).hexdigest()[:16]

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._before}/{quote(name)}{self._query}")

    def __str__(self) -> str:
        return redacted(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)


ShardPath = Path | RemotePath


def is_remote(url: str) -> bool:
    """Return True for a URL at which parts of a file may be read."""
    return _REMOTE.match(url) is not None and not os.path.lexists(url)


def as_path(name: str | Path | RemotePath) -> ShardPath:
    """Return the path of a local file, or of one on a server."""
    if isinstance(name, RemotePath):
        return name
    return RemotePath(name) if isinstance(name, str) and is_remote(name) else Path(name)
