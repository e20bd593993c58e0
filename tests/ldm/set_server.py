"""HTTP server of a folder on this machine, with the faults that a test asks for."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldm.shards import kept_tables


class SetServer(ThreadingHTTPServer):
    """Server of the files in `folder`.

    Attributes:
        has_ranges: False answers each request with the whole file.
        delay: seconds before each answer.
        fault: function of the name of a file and the number of earlier requests for it. It returns None, an HTTP
            status, or, as a float, a number of bytes after which the connection is cut.
        headers: headers in place of those that it would send; None leaves one out.
        requests: number of requests by file name.
        queries: the query of each request.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.has_ranges = True
        self.delay = 0.0
        self.fault: Callable[[str, int], int | float | None] = lambda name, number: None
        self.headers: dict[str, str | None] = {}
        self.requests: Counter[str] = Counter()
        self.bytes_sent = 0
        self.queries: list[str] = []
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SetServer

    def send_header(self, keyword: str, value: str) -> None:
        if keyword not in self.server.headers:
            super().send_header(keyword, value)

    def end_headers(self) -> None:
        for keyword, value in self.server.headers.items():
            if value is not None:
                super().send_header(keyword, value)
        super().end_headers()

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        name, _, query = self.path.lstrip("/").partition("?")
        with server.counting:
            number = server.requests[name]
            server.requests[name] += 1
            server.queries.append(query)
        time.sleep(server.delay)
        fault = server.fault(name, number)
        path = server.folder / name
        if isinstance(fault, int) or not path.is_file():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        total, asked = len(data), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self._send(data, total, asked if server.has_ranges else None, fault)

    def _send(self, data: bytes, total: int, asked: re.Match[str] | None, cut: float | None) -> None:
        version = hashlib.md5(data).hexdigest()
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), total - 1)
            self.send_response(206 if first < total else 416)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}" if first < total else f"bytes */{total}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{version}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data if cut is None else data[: int(cut)])
        except OSError:  # the client has what it wanted
            self.close_connection = True
        if cut is not None:
            self.close_connection = True
        with self.server.counting:
            self.server.bytes_sent += len(data)


@contextmanager
def serving(folder: Path) -> Iterator[SetServer]:
    """Serve `folder` from a thread of this process."""
    server = SetServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving_with_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SetServer]:
    """Serve the set in `folder`, with the tables of its members, which a writer leaves beside larger sets alone."""
    with monkeypatch.context() as patched:
        patched.setattr(kept_tables, "LEAST_SAMPLES", 1)
        kept_tables.keep_tables(sorted(folder.glob("*.tar")))
    with serving(folder) as server:
        yield server
