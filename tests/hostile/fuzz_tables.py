"""Kept tables of shards for the fuzzer: whatever such a file holds, the samples are those of the tar."""

from __future__ import annotations

import os
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ldm.shards import kept_tables
from ldm.shards.reader import ShardDataset
from tests.hostile.fuzz_values import write_file
from tests.hostile.sample_files import SAMPLE, tar_of

_SHARD = tar_of([(name.replace("0", str(n), 1), data) for n in range(3) for name, data in SAMPLE])
_TIME = 1_600_000_000_000_000_000  # modification time of the shard, in ns


def make_table(rng: random.Random) -> bytes:
    return _table()


@cache
def _table() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        _read(Path(name))
        return (Path(name) / kept_tables.TABLES).read_bytes()


def read_with_table(folder: Path, data: bytes) -> Any:
    write_file(folder, kept_tables.TABLES, data)
    return _read(folder)


def samples_of_the_tar(data: bytes) -> Any:
    return _samples()


@cache
def _samples() -> Any:
    with tempfile.TemporaryDirectory() as name:
        return _read(Path(name))


def _read(folder: Path) -> Any:
    """Return keys, captions and arrays of the shard in `folder`, with the table that is there or a new one."""
    path = write_file(folder, "s.tar", _SHARD)
    os.utime(path, ns=(_TIME, _TIME))
    with patch.object(kept_tables, "LEAST_SAMPLES", 1):
        dataset = ShardDataset([path])
        return [{**dataset[number], "keys": dataset.sample_keys[number]} for number in range(len(dataset))]
