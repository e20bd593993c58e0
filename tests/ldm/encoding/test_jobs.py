"""Records of finished shards are whole, or their shards are made again."""

import json

import pytest

from ldm.encoding.jobs import read_record, take_up, wait_for_records, write_record
from ldm.shards.verify import file_sha256
from ldm.util import UserError

REPORT = {"pictures": 1, "without_caption": 0, "failed": [], "sizes": {"64x64": 1}, "f8": [[8, 8, 8]]}


@pytest.fixture
def shard(tmp_path):
    """Return a shard with a record of it."""
    path = tmp_path / "s.tar"
    path.write_bytes(b"shard")
    written = {"name": "s.tar", "samples": 1, "bytes": 5, "sha256": file_sha256(path)}
    write_record(path, {**written, **REPORT})
    return path


def record_of(shard):
    return shard.parent / ".parts" / f"{shard.name}.json"


BROKEN = [
    b"",
    b"{",
    b"[" * 100_000,
    b"\xff\xfe",
    b"null",
    b"[1]",
    b"{}",
    b'{"samples": 1}',
    *(
        json.dumps({**REPORT, "samples": 0, key: value}).encode()
        for key in ("samples", *REPORT)
        for value in (None, "x")
    ),
]


@pytest.mark.parametrize("damage", BROKEN, ids=range(len(BROKEN)))
def test_read_record_refuses_a_damaged_record_and_take_up_makes_its_shard_again(damage, shard, caplog):
    assert take_up(shard) == read_record(shard) != None  # noqa: E711
    record_of(shard).write_bytes(damage)
    with pytest.raises(UserError, match="remove it, and its shard is made again") as caught:
        read_record(shard)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError):
        wait_for_records([shard])
    assert take_up(shard) is None
    assert "it is made again" in caplog.text
    assert read_record(shard) is None


def test_take_up_makes_a_shard_again_that_is_not_what_was_written(shard):
    shard.write_bytes(b"shar!")
    assert take_up(shard) is None


def test_take_up_keeps_the_record_of_a_shard_without_samples(tmp_path):
    record = {**REPORT, "samples": 0}
    write_record(tmp_path / "s.tar", record)
    assert take_up(tmp_path / "s.tar") == record
