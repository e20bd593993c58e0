"""The shards that a list of images makes, and in `.parts/` beside them a record of each that is finished."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.encoding.shard_set import PARTS, POLL
from ldm.files import atomic_write
from ldm.shards.verify import file_sha256
from ldm.shards.writer import is_spread, shard_paths
from ldm.util import UserError

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def plan_shards(out: str, count: int, shard_size: int) -> list[tuple[Path, range]]:
    """The shards that `count` images make, `shard_size` to each, with the numbers of their images.

    Raises:
        UserError: `out` names too few.
    """
    size = shard_size if is_spread(out) else count
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    paths = list(islice(shard_paths(out), len(parts)))
    if len(paths) < len(parts):
        raise UserError(f"--out {out}: {len(paths)} shards of {size} images are too few for {count}")
    return list(zip(paths, parts, strict=True))


def _record_path(shard: Path) -> Path:
    return shard.parent / PARTS / f"{shard.name}.json"


def write_record(shard: Path, record: Record) -> None:
    """Note that `shard` is finished: `record` has what the index says of it, `bytes` and `sha256` among that.

    A shard for which there was nothing to write has neither, and no file.
    """
    with atomic_write(_record_path(shard)) as path:
        path.write_text(json.dumps(record) + "\n")


def read_record(shard: Path) -> Record | None:
    """The record of `shard`; None if it is not finished."""
    try:
        return json.loads(_record_path(shard).read_text())
    except FileNotFoundError:
        return None


def take_up(shard: Path) -> Record | None:
    """The record of a shard that an earlier run finished, if all of its bytes are as they were written; else None."""
    record = read_record(shard)
    if record is None or "sha256" not in record:
        return record
    if shard.is_file() and shard.stat().st_size == record["bytes"] and file_sha256(shard) == record["sha256"]:
        return record
    logger.warning("%s: is not what was written; it is made again", shard)
    _record_path(shard).unlink()
    return None


def wait_for_records(shards: Sequence[Path]) -> list[Record]:
    """The records of all `shards`; waits for those that other processes make."""
    records: dict[Path, Record] = {}
    told = False
    while True:
        for shard in shards:
            if shard not in records and (record := read_record(shard)) is not None:
                records[shard] = record
        if len(records) == len(shards):
            return [records[shard] for shard in shards]
        if not told:
            logger.info("waiting for %d shards of other processes", len(shards) - len(records))
        told = True
        time.sleep(POLL)
