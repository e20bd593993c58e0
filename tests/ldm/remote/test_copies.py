"""Cache of copies: its size limit, which copies it removes, and processes that share it."""

import errno
import os
import subprocess
import sys

import pytest

from ldm.identity import Replaced
from ldm.remote import retries
from ldm.remote.copies import cache_folder, has_copy, local_copy, look_at, open_copy, read_part, state_of
from ldm.remote.path import RemotePath
from ldm.util import UserError
from tests.ldm.set_server import serving


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve five files of 1000 bytes, and let the cache hold three and a half."""
    monkeypatch.setenv("LATENT_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LATENT_FINETUNE_CACHE_GB", "0.0000035")
    monkeypatch.setattr(retries, "PAUSES", (0.01, 0.01))
    (tmp_path / "served").mkdir()
    for number in range(5):
        (tmp_path / f"served/{number}.tar").write_bytes(bytes([number]) * 1000)
    with serving(tmp_path / "served") as server:
        server.has_ranges = False
        yield server


def copy_of(server, number):
    """Read a file through the cache; return True if the server was not asked for the whole."""
    path = RemotePath(f"{server.url}/{number}.tar")
    identity = state_of(path).identity
    before = server.requests[f"{number}.tar"]
    assert read_part(path, identity, 10, 5) == bytes([number]) * 5
    return server.requests[f"{number}.tar"] == before


def is_kept(server, number):
    path = RemotePath(f"{server.url}/{number}.tar")
    return has_copy(path, state_of(path).identity)


def test_the_copies_that_are_used_least_are_removed(server):
    for time, number in enumerate((0, 1, 2)):
        copy_of(server, number)
        path = RemotePath(f"{server.url}/{number}.tar")
        os.utime(local_copy(path, state_of(path).identity), (time, time))
    copy_of(server, 0)  # used again
    copy_of(server, 3)
    assert [is_kept(server, number) for number in range(4)] == [True, False, True, True]
    copy_of(server, 1)
    assert [is_kept(server, number) for number in range(4)] == [True, True, False, True]
    assert sum(path.stat().st_size for path in cache_folder().glob("*.tar")) <= 3500
    assert not [path for path in cache_folder().iterdir() if "tmp" in path.name]


def test_the_limit_is_checked(server, monkeypatch):
    monkeypatch.setenv("LATENT_FINETUNE_CACHE_GB", "0.0000005")
    with pytest.raises(
        UserError, match=r"0\.tar: has 0\.0 GB, more than the 5e-07 GB of .*; set LATENT_FINETUNE_CACHE_GB"
    ):
        copy_of(server, 0)
    monkeypatch.setenv("LATENT_FINETUNE_CACHE_GB", "lots")
    with pytest.raises(UserError, match="LATENT_FINETUNE_CACHE_GB=lots: give the size limit"):
        copy_of(server, 0)


def test_a_copy_is_whole_and_of_the_version_that_was_seen(server):
    path = RemotePath(f"{server.url}/0.tar")
    identity = state_of(path).identity
    server.fault = lambda name, number: 300.0 if name == "0.tar" and number < 3 else None
    assert open_copy(path, identity).read() == bytes(1000)
    other = RemotePath(f"{server.url}/1.tar")
    look_at([other])
    (server.folder / "1.tar").write_bytes(bytes(1000))
    with pytest.raises(Replaced, match=r"1\.tar: was replaced or changed"):
        open_copy(other, state_of(other).identity)
    assert open_copy(other).read() == bytes(1000)  # the present version
    checked = RemotePath(f"{server.url}/2.tar", sha256="0" * 64)
    with pytest.raises(UserError, match=r"2\.tar: was changed: its SHA-256"):
        open_copy(checked, state_of(checked).identity)
    assert not has_copy(checked, state_of(checked).identity)


def test_processes_share_one_copy(server):
    path = RemotePath(f"{server.url}/0.tar")
    code = (
        "from ldm.remote.path import RemotePath; from ldm.remote.copies import *; import sys\n"
        f"path = RemotePath({path.url!r})\n"
        "identity = state_of(path).identity\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "sys.exit(open_copy(path, identity).read() != bytes(1000))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    server.requests.clear()
    server.delay = 0.2
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert server.requests["0.tar"] == 1


def test_copies_without_a_version_are_of_this_run_alone(server, monkeypatch):
    server.headers = {"ETag": None}
    copy_of(server, 0)
    assert is_kept(server, 0) and copy_of(server, 0)
    monkeypatch.setattr("ldm.remote.copies._made", set())  # as in a new process
    (server.folder / "0.tar").write_bytes(bytes([7]) * 1000)
    path = RemotePath(f"{server.url}/0.tar")
    assert open_copy(path).read() == bytes([7]) * 1000


def test_a_full_disk_is_no_fault_of_the_server(server, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ldm.remote.http.sync", full)
    path = RemotePath(f"{server.url}/0.tar")
    with pytest.raises(UserError, match=r"cache: cannot keep a copy of http.*0\.tar: No space left on device; set"):
        open_copy(path, (1000, 1, 0))
