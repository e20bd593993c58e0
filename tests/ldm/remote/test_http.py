"""Faults and peculiarities of HTTP servers."""

import threading
import time

import pytest

from ldm.identity import Replaced
from ldm.remote import http, retries
from ldm.remote.copies import look_at, read_part, state_of
from ldm.remote.path import RemotePath
from ldm.remote.retries import NotServed
from ldm.util import UserError
from tests.ldm.set_server import serving


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a file of 3000 bytes."""
    monkeypatch.setenv("LATENT_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "PAUSES", (0.01, 0.01))
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.tar").write_bytes(bytes(range(250)) * 12)
    with serving(tmp_path / "served") as server:
        yield server


def part(server, first, size):
    path = RemotePath(f"{server.url}/a.tar")
    return read_part(path, state_of(path).identity, first, size)


def test_parts_of_a_file(server):
    data = (server.folder / "a.tar").read_bytes()
    state = state_of(RemotePath(f"{server.url}/a.tar"))
    assert state.identity[0] == 3000 and state.has_parts and state.head == data[:512]
    assert part(server, 700, 900) == data[700:1600] and part(server, 2900, 500) == data[2900:]
    server.has_ranges = False  # a proxy that answers with the whole file now and then
    assert part(server, 700, 900) == data[700:1600]


def test_an_answer_that_does_not_come_is_retried(server, monkeypatch):
    assert part(server, 0, 10) == bytes(range(10))
    monkeypatch.setattr(http, "SILENT_SECONDS", 0.3)
    slow = threading.Event()

    def fault(name, number):
        if not slow.is_set():
            slow.set()
            time.sleep(1)

    server.fault = fault
    assert part(server, 0, 10) == bytes(range(10))
    assert slow.is_set()
    server.delay = 1
    with pytest.raises(UserError, match=r"a\.tar: cannot be read: no answer in time, 3 times"):
        part(server, 0, 10)


def test_a_server_that_is_gone_is_one_line(server):
    path = RemotePath(f"{server.url}/a.tar")
    server.server_close()
    server.shutdown()
    with pytest.raises(UserError, match=r"/a\.tar: cannot be read: the connection failed \(.*\), 3 times"):
        state_of(path)


def test_faults_for_good_are_not_retried(server):
    for status in (401, 403, 404, 410):
        server.fault = lambda name, number, status=status: status
        server.requests.clear()
        with pytest.raises(NotServed, match=f"HTTP {status}"):
            look_at([RemotePath(f"{server.url}/a.tar")])
        assert server.requests["a.tar"] == 1
    for url in ("http://[::1/a.tar", "http:///a.tar", "http://host:port/a.tar"):
        with pytest.raises(UserError, match=r"not a valid URL|check the URL"):
            state_of(RemotePath(url))


def test_headers_decide_on_identity_and_wait(server, monkeypatch):
    server.headers = {"ETag": None, "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    assert part(server, 0, 4) == bytes(range(4))
    server.headers["Last-Modified"] = "Mon, 01 Jan 2024 00:00:01 GMT"
    with pytest.raises(Replaced, match=r"a\.tar: was replaced or changed"):
        part(server, 0, 4)
    server.headers = {"Content-Range": "bytes 0-3/*"}
    with pytest.raises(UserError, match="does not tell the size"):
        look_at([RemotePath(f"{server.url}/a.tar")])
    server.headers = {"Content-Range": "bytes 8-11/3000"}
    with pytest.raises(UserError, match="gave another part than byte 0"):
        look_at([RemotePath(f"{server.url}/a.tar")])
    waits = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    server.headers = {"Retry-After": "7"}
    server.fault = lambda name, number: 503
    with pytest.raises(UserError, match="503"):
        look_at([RemotePath(f"{server.url}/a.tar")])
    assert [wait for wait in waits if wait] == [7, 7]  # the server's own are 0


def test_redirects_are_followed(server, tmp_path):
    with serving(tmp_path / "served") as other:
        other.fault = lambda name, number: 302
        other.headers = {"Location": f"{server.url}/a.tar"}
        path = RemotePath(f"{other.url}/a.tar")
        assert read_part(path, state_of(path).identity, 5, 5) == bytes(range(5, 10))


def test_an_empty_file_has_no_bytes(server):
    (server.folder / "a.tar").write_bytes(b"")
    assert state_of(RemotePath(f"{server.url}/a.tar")).identity[0] == 0
