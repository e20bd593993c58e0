"""Records of finished shards: damaged ones, and those of an older version."""

import json

import pytest

from ldm.encoding.jobs import read_record, verified_record, wait_for_records
from ldm.util import UserError

RECORD = {"samples": 0, "images": 0, "without_caption": 0, "failed": [], "sizes": {}, "f8": []}
DAMAGED = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"3",
    b"null",
    b"[" * 100_000,
    b"{}",
    b'{"samples": "x"}',
    b'{"samples": -1}',
    b'{"samples": true}',
    b'{"samples": 2}',
    b'{"samples": 2, "name": "s.tar", "bytes": 3, "sha256": [1]}',
    b'{"samples": 2, "name": "../s.tar", "bytes": 3, "sha256": "ab"}',
    *(json.dumps(RECORD | {key: value}).encode() for key in RECORD for value in ("x", [3], {"a": "b"}, None)),
    *(json.dumps({k: v for k, v in RECORD.items() if k != key}).encode() for key in RECORD),
    json.dumps(RECORD | {"cut": [{"name": "x"}]}).encode(),
]


@pytest.mark.parametrize("data", DAMAGED)
def test_read_record_says_of_a_damaged_one_in_a_line(tmp_path, caplog, data):
    shard = tmp_path / "s.tar"
    (tmp_path / ".parts").mkdir()
    path = tmp_path / ".parts/s.tar.json"
    path.write_bytes(data)
    for read in (lambda: read_record(shard), lambda: wait_for_records([shard])):
        with pytest.raises(
            UserError, match=r"s\.tar\.json: damaged: .*remove it, and its shard is written again"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert verified_record(shard) is None and not path.exists()
    assert "s.tar.json: damaged: " in caplog.text and "; its shard is written again" in caplog.text
