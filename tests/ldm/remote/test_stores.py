"""Files in object stores, with fsspec's file system in memory in place of the packages."""

import sys
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from ldm.data.stream import ShardStream
from ldm.identity import Replaced
from ldm.remote import retries
from ldm.remote.copies import look_at, open_copy, read_part, state_of
from ldm.remote.path import RemotePath
from ldm.remote.retries import NotServed
from ldm.util import UserError
from tests.ldm.shard_files import sample_members, write_tar

PATH = RemotePath("s3://bucket/set/000.tar")


class FakeStore(MemoryFileSystem):
    """Store whose `info` has a version, and whose next calls may fail."""

    protocol = "s3"
    faults: ClassVar[list[Exception]] = []

    def info(self, path, **options):
        if self.faults:
            raise self.faults.pop()
        content = self.store[self._strip_protocol(path)].getvalue() if self.exists(path) else b""
        return {**super().info(path, **options), "ETag": str(hash(content))}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "PAUSES", (0.01, 0.01))
    monkeypatch.setitem(_registry, "s3", FakeStore)
    files = fsspec.filesystem("s3")
    files.pipe(PATH.url, bytes(range(250)) * 4)
    yield files
    files.store.clear()


def test_parts_and_copies_of_a_file(store):
    identity = state_of(PATH).identity
    assert identity[0] == 1000 and read_part(PATH, identity, 700, 100) == (bytes(range(250)) * 4)[700:800]
    assert open_copy(PATH, identity).read() == bytes(range(250)) * 4
    store.pipe(PATH.url, bytes(1000))
    with pytest.raises(Replaced, match=r"s3://bucket/set/000\.tar: was replaced or changed"):
        read_part(PATH, identity, 700, 100)


def test_faults(store):
    identity = state_of(PATH).identity
    FakeStore.faults = [ConnectionError("reset")]
    assert read_part(PATH, identity, 0, 3) == bytes(range(3))
    FakeStore.faults = [OSError("slow\ndown")] * 3
    with pytest.raises(UserError, match=r"000\.tar: cannot be read: OSError: slow down, 3 times"):
        read_part(PATH, identity, 0, 3)
    FakeStore.faults = [PermissionError("no")]
    with pytest.raises(NotServed, match=r"000\.tar: no right to read it; check the URL and the credentials"):
        read_part(PATH, identity, 0, 3)
    FakeStore.faults = [RuntimeError("no\ncredentials")]
    with pytest.raises(UserError, match=r"000\.tar: cannot be read: no credentials$"):
        read_part(PATH, identity, 0, 3)
    with pytest.raises(NotServed, match=r"other\.tar: no such file"):
        look_at([RemotePath("s3://bucket/other.tar")])


def test_a_missing_package_is_named(monkeypatch):
    for package, url in (("s3fs", "s3://bucket/none.tar"), ("gcsfs", "gs://bucket/none.tar")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            UserError, match=f"none.tar: needs the package {package}; install it: pip install {package}"
        ):
            state_of(RemotePath(url))


def test_a_set_without_index_in_a_store_is_streamed(store, tmp_path):
    store.pipe(PATH.url, write_tar(tmp_path / "a.tar", sample_members(0) + sample_members(1)).read_bytes())
    assert [sample["__key__"] for sample in ShardStream([PATH.url])] == ["000000", "000001"]
