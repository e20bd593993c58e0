"""Files on HTTP servers. A server with support for `Range` sends parts of a file.

The requests go through the session of fsspec's HTTP file system, which adds proxies, redirects, and one event loop per
process. Its `cat_file` is not used: it hides the headers that show whether a file has changed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import BinaryIO, NamedTuple

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from yarl import URL

from ldm.identity import Identity
from ldm.remote.file_server import HEAD, State, identity_from
from ldm.remote.path import RemotePath
from ldm.remote.retries import Momentary, NotServed, is_of_disk
from ldm.util import UserError

CONNECT_SECONDS, SILENT_SECONDS = 20.0, 60.0  # limits of a connection's start, and of a pause within an answer
_BLOCK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_FOR_GOOD = (aiohttp.InvalidURL, aiohttp.ClientSSLError, aiohttp.TooManyRedirects)
_ADVICE = {
    401: "give user and password, or a signed URL",
    403: "check the rights, or renew the signature of the URL",
    404: "check the URL",
    410: "check the URL",
}
_OPENED: dict[int, AsyncFileSystem] = {}  # by process; a session must not be used after a fork


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    data: bytes


class HttpServer:
    """Server of the file at an `http:` or `https:` URL."""

    def __init__(self, path: RemotePath) -> None:
        self.path = path

    def state(self) -> State:
        answer = self._ask(0, HEAD)
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # an empty file
            return State(identity_from(0, ""), False, b"")
        return State(self._identity(answer), answer.status == HTTPStatus.PARTIAL_CONTENT, answer.data)

    def read(self, offset: int, size: int) -> tuple[Identity, bytes] | None:
        answer = self._ask(offset, size)
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the file is shorter now
            return identity_from(0, ""), b""
        if answer.status != HTTPStatus.PARTIAL_CONTENT:
            return None
        return self._identity(answer), answer.data

    def save(self, file: BinaryIO) -> Identity:
        file.seek(0)
        file.truncate()
        answer = self._send({}, lambda status, block: file.write(block) is not None)
        self._check(answer)
        identity = self._identity(answer)
        if file.tell() != identity[0]:
            raise Momentary(f"the connection was cut at byte {file.tell()} of {identity[0]}")
        return identity

    def _ask(self, offset: int, size: int) -> _Answer:
        """Return the answer to a request for a part. Of a whole file in its place, only the beginning is read."""
        data = bytearray()

        def keep(status: int, block: bytes) -> bool:
            data.extend(block)
            return len(data) < (size if status == HTTPStatus.PARTIAL_CONTENT else HEAD)

        answer = self._send({"Range": f"bytes={offset}-{offset + size - 1}"}, keep)
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return answer
        self._check(answer)
        if answer.status == HTTPStatus.PARTIAL_CONTENT:
            start = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
            if start != str(offset):
                raise UserError(f"{self.path}: the server gave another part than byte {offset}; copy the set")
            if len(data) < min(size, self._identity(answer)[0] - offset):
                raise Momentary(f"the connection was cut after {len(data)} of {size} bytes")
        return answer._replace(data=bytes(data[:size]))

    def _send(self, headers: Mapping[str, str], keep: Callable[[int, bytes], bool]) -> _Answer:
        """Return the answer, with its data passed to `keep` block by block, until that returns False."""
        files = _files()
        try:  # the errors of aiohttp name the URL with its secrets, so they are not chained
            return sync(files.loop, _get, files, self.path.url, headers, keep)
        except _FOR_GOOD as error:
            raise UserError(f"{self.path}: cannot be read: {type(error).__name__}; check the URL") from None
        except (TimeoutError, asyncio.TimeoutError):  # two classes in Python 3.10
            raise Momentary("no answer in time") from None
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
            raise Momentary("the connection was cut") from None
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, OSError) and is_of_disk(error):
                raise
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise Momentary(f"the connection failed ({reason})") from None
        except ValueError:
            raise UserError(f"{self.path}: not a valid URL; give http://HOST/PATH") from None

    def _check(self, answer: _Answer) -> None:
        """Raise an error unless the answer has the file or a part of it."""
        status = answer.status
        if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise UserError(f"{self.path}: the server compresses the file; turn this off there, or copy the set")
            return
        name = f"HTTP {status} ({HTTPStatus(status).phrase})" if status in set(HTTPStatus) else f"HTTP {status}"
        if status in _PASSING:
            wait = answer.headers.get("Retry-After", "")
            raise Momentary(name, float(wait) if wait.isdecimal() else 0)
        if status in _ADVICE:
            raise NotServed(f"{self.path}: cannot be read: {name}; {_ADVICE[status]}")
        raise UserError(f"{self.path}: cannot be read: {name}")

    def _identity(self, answer: _Answer) -> Identity:
        headers = answer.headers
        is_part = answer.status == HTTPStatus.PARTIAL_CONTENT
        size = headers.get("Content-Range", "").rpartition("/")[2] if is_part else headers.get("Content-Length", "")
        if not size.isdecimal():
            raise UserError(f"{self.path}: the server does not tell the size of the file; copy the set")
        return identity_from(int(size), headers.get("ETag") or headers.get("Last-Modified") or "")


def _files() -> AsyncFileSystem:
    """Return fsspec's HTTP file system of this process, whose session keeps connections open."""
    process = os.getpid()
    if process not in _OPENED:
        options = {"client_kwargs": {"trust_env": True}, "skip_instance_cache": True}  # proxies of the environment
        _OPENED[process] = fsspec.filesystem("http", **options)
    return _OPENED[process]


async def _get(
    files: AsyncFileSystem, url: str, headers: Mapping[str, str], keep: Callable[[int, bytes], bool]
) -> _Answer:
    session = await files.set_session()
    limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    headers = {"Accept-Encoding": "identity", **headers}
    # A URL with escapes is sent as it is, because a signature may belong to its spelling.
    async with session.get(URL(url, encoded="%" in url), headers=headers, timeout=limits) as response:
        if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            async for block in response.content.iter_chunked(_BLOCK):
                if not keep(response.status, block):
                    break
        return _Answer(response.status, response.headers.copy(), b"")
