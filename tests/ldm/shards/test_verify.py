"""A shard whose bytes changed is refused by name; what was read once is not read again."""

import json
import os

import pytest

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.shards import verify
from ldm.shards.index import INDEX, write_index
from ldm.shards.verify import file_sha256, verify_shards
from ldm.util import UserError
from tests.ldm.shard_files import write_set


@pytest.fixture
def shards(tmp_path):
    """Three shards with their index."""
    write_set(tmp_path, 9, shards=3)
    paths = sorted(tmp_path.glob("*.tar"))
    entries = [{"name": p.name, "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths]
    write_index(tmp_path, {"complete": True, "shards": entries})
    return paths


@pytest.fixture
def reads(monkeypatch):
    """Record the names of the files that are read whole."""
    names = []

    def counted(path):
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(verify, "file_sha256", counted)
    return names


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[700] ^= 1  # in an array
    path.write_bytes(data)


def train(path, **options):
    WebDataNpyModuleFromConfig(1, str(path), **options).setup("fit")


def test_a_flipped_bit_is_refused_by_name(shards):
    train(shards[0].parent)
    flip_a_bit(shards[1])
    for _ in range(2):  # that it was read makes it no better
        with pytest.raises(UserError, match=r"set-001\.tar: was changed.*copy it again"):
            train(shards[0].parent)
    train(shards[0])  # the others are whole
    train(shards[0].parent, verify_shards=False)


def test_a_damaged_shard_that_was_mended_is_taken(shards):
    whole, times = shards[1].read_bytes(), shards[1].stat()
    flip_a_bit(shards[1])
    os.utime(shards[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"set-001\.tar: was changed"):
        verify_shards(shards)
    shards[1].write_bytes(whole)
    os.utime(shards[1], ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and `rsync -t` do
    verify_shards(shards)


def test_each_shard_is_read_once(shards, reads):
    verify_shards(shards[:1])
    verify_shards(shards)
    verify_shards(shards)
    assert sorted(reads) == [path.name for path in shards]
    os.utime(shards[2], ns=(1, 1))
    verify_shards(shards)
    assert reads[3:] == ["set-002.tar"]


def test_another_index_is_compared_with_what_is_there(shards, reads):
    verify_shards(shards)
    index = json.loads((shards[0].parent / INDEX).read_text())
    index["shards"][2]["sha256"] = "0" * 64
    write_index(shards[0].parent, index)
    with pytest.raises(UserError, match=r"set-002\.tar"):
        verify_shards(shards)
    assert reads[3:] == ["set-002.tar"]


@pytest.mark.parametrize("seen", ["{", "[]", '{"set-001.tar": 3}', "[" * 100_000])
def test_notes_that_are_broken_are_made_anew(shards, seen):
    notes = shards[0].parent / ".verified.json"
    notes.write_text(seen)
    verify_shards(shards)
    assert len(json.loads(notes.read_text())) == 3


def test_a_folder_that_cannot_be_written_is_read_each_time(shards, reads, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(verify, "atomic_write", refused)
    verify_shards(shards)
    verify_shards(shards)
    assert len(reads) == 6


def test_what_has_no_checksum_is_not_read(shards, reads):
    write_index(shards[0].parent, {"shards": [{"name": path.name} for path in shards]})
    verify_shards(shards)
    (shards[0].parent / INDEX).unlink()
    verify_shards(shards)
    assert reads == []
