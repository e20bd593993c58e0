"""The shards that a list of pictures makes, and in `.parts/` beside them a record of each that is finished."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.encoding.shard_set import PARTS, POLL
from ldm.files import atomic_write, read_at_most
from ldm.shards.index import FAILURES, SHARD_ENTRIES, WHOLE, Entry, check_entries, is_whole
from ldm.shards.verify import file_sha256
from ldm.shards.writer import is_spread, shard_paths
from ldm.util import UserError

logger = logging.getLogger(__name__)

Record = dict[str, Any]
_MOST_BYTES = 1 << 28  # of a record
_REMOVE = "remove it, and its shard is made again"


def _are_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(is_whole(count) for count in value.values())


def _are_shapes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(s, list) and all(map(is_whole, s)) for s in value)


_ENTRIES: dict[str, Entry] = {
    "samples": WHOLE,
    "pictures": WHOLE,
    "without_caption": WHOLE,
    "failed": FAILURES,
    "sizes": (_are_sizes, "not numbers of samples by size"),
    "f8": (_are_shapes, "not a list of shapes"),
}


def plan_shards(out: str, count: int, shard_size: int) -> list[tuple[Path, range]]:
    """The shards that `count` pictures make, `shard_size` to each, with the numbers of their pictures.

    Raises:
        UserError: `out` names too few.
    """
    size = shard_size if is_spread(out) else count
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    paths = list(islice(shard_paths(out), len(parts)))
    if len(paths) < len(parts):
        raise UserError(f"--out {out}: {len(paths)} shards of {size} pictures are too few for {count}")
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
    """Return the record of `shard`; None if it is not finished.

    Raises:
        UserError: it is damaged.
    """
    path = _record_path(shard)
    try:
        record = json.loads(read_at_most(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {' '.join(str(error).split())}; {_REMOVE}") from error
    needed = (*_ENTRIES, *SHARD_ENTRIES) if isinstance(record, dict) and record.get("samples") else tuple(_ENTRIES)
    if not isinstance(record, dict) or not record.keys() >= set(needed):
        raise UserError(f"{path}: is {record!r:.80}, not a record of a shard; {_REMOVE}")
    check_entries(f"{path}: its ", record, {**SHARD_ENTRIES, **_ENTRIES}, _REMOVE)
    return record


def take_up(shard: Path) -> Record | None:
    """Return the record of a shard that an earlier run finished, if its bytes are as they were written; else None."""
    try:
        record = read_record(shard)
    except UserError as error:
        logger.warning("%s: it is made again, since its record is damaged: %s", shard, error)
    else:
        if record is None or "sha256" not in record:
            return record
        if shard.is_file() and shard.stat().st_size == record["bytes"] and file_sha256(shard) == record["sha256"]:
            return record
        logger.warning("%s: is not what was written; it is made again", shard)
    _record_path(shard).unlink()
    return None


def wait_for_records(shards: Sequence[Path]) -> list[Record]:
    """Return the records of all `shards`; wait for those that other processes make."""
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
