"""Jobs of a set, one per shard, and the records of finished shards in the folder `.parts/` beside them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ldm.encoding.shard_set import PARTS, POLL
from ldm.files import atomic_write, read_at_most
from ldm.images.find import ImageItem
from ldm.shards.index import REPEATS, is_digest, is_failures, is_repeats, is_whole
from ldm.shards.sample import LATENT
from ldm.shards.verify import file_sha256
from ldm.shards.writer import is_spread, shard_paths
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

Record = dict[str, Any]
MADE_FROM = "made_from"  # entry of a record: digest of the images of the shard, if they are read as a stream
_MOST_BYTES = 1 << 28  # size limit of a record's file


def plan_shards(out: str, count: int, shard_size: int) -> list[tuple[Path, range]]:
    """Return the path of each shard and the range of its image or prompt numbers, `shard_size` per shard.

    Raises:
        UserError: the pattern `out` has too few names for `count` images or prompts.
    """
    size = shard_size if is_spread(out) else count
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    paths = list(islice(shard_paths(out), len(parts)))
    refuse_if(
        len(paths) < len(parts),
        f"--out {out}: {len(paths)} shards of {size} cannot hold {count}; name more shards, such as %06d.tar",
    )
    return list(zip(paths, parts, strict=True))


class ImageJob(NamedTuple):
    """Shard, with the numbers and the images that it is made from."""

    path: Path
    numbers: range
    items: Sequence[ImageItem]


def jobs_of(out: str, items: Sequence[ImageItem], shard_size: int) -> list[ImageJob]:
    """Return the jobs of `plan_shards` with their images."""
    return [
        ImageJob(path, part, items[part.start : part.stop]) for path, part in plan_shards(out, len(items), shard_size)
    ]


def stream_jobs(out: str, items: Iterable[ImageItem], shard_size: int) -> Iterator[ImageJob]:
    """Yield the jobs of `jobs_of` for an unlimited pattern `out`, as `items` arrive."""
    arriving, first = iter(items), 0
    for path in shard_paths(out):
        part = list(islice(arriving, shard_size))
        if not part:
            return
        yield ImageJob(path, range(first, first + len(part)), part)
        first += len(part)


def _record_path(shard: Path) -> Path:
    return shard.parent / PARTS / f"{shard.name}.json"


def write_record(shard: Path, record: Record) -> None:
    """Store the `record` of the finished `shard`: its entries of the index, such as `bytes` and `sha256`.

    A shard without samples has no file, no `bytes` and no `sha256`.
    """
    with atomic_write(_record_path(shard)) as path:
        path.write_text(json.dumps(record) + "\n")


def read_record(shard: Path) -> Record | None:
    """Return the record of `shard`, or None if the shard is not finished.

    Raises:
        UserError: the record is damaged.
    """
    path = _record_path(shard)
    try:
        record = json.loads(read_at_most(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # includes UserError
        raise UserError(f"{path}: damaged: {error!s:.200}; remove it, and its shard is written again") from error
    wrong = _wrong_entry(record, shard.name)
    refuse_if(wrong is not None, f"{path}: damaged: {wrong}; remove it, and its shard is written again")
    return record


def _wrong_entry(record: Any, name: str) -> str | None:
    """Return the first fault of the record of the shard `name`, or None if it has none."""
    if not isinstance(record, dict):
        return f"{record!r:.80} is not a record"
    if not is_whole(record.get("samples")):
        return f"samples is {record.get('samples')!r:.80}"
    needed = {"name": lambda value: value == name, "bytes": is_whole, "sha256": is_digest} if record["samples"] else {}
    for key, is_right in (_ENTRIES | needed).items():
        if (key in record or key in needed) and not is_right(record.get(key)):
            return f"{key} is {record.get(key)!r:.80}"
    missing = _OF_IMAGES - record.keys() if _OF_IMAGES & record.keys() else set()
    return f"{min(missing)} is missing" if missing else None


def _is_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_whole, value.values()))


def _is_shapes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(shape, list) and all(map(is_whole, shape)) for shape in value)


def _is_cut(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and is_whole(entry.get("tokens"))
        for entry in value
    )


_OF_IMAGES = {"images", "without_caption", "failed", "sizes", LATENT}
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "images": is_whole,
    "without_caption": is_whole,
    "without_mask": is_whole,
    "failed": is_failures,
    "sizes": _is_sizes,
    LATENT: _is_shapes,
    "cut": _is_cut,
    REPEATS: is_repeats,
    MADE_FROM: is_digest,
}


def verified_record(shard: Path) -> Record | None:
    """Return the record of a shard that an earlier run finished, after a check of the shard's SHA-256.

    Return None for a shard that is unfinished or changed, or whose record is damaged. Such a shard is written again.
    """
    try:
        record = read_record(shard)
    except UserError as error:
        logger.warning(
            "%s", str(error).replace("remove it, and its shard is written again", "its shard is written again")
        )
        _record_path(shard).unlink()
        return None
    if record is None or "sha256" not in record:
        return record
    if shard.is_file() and shard.stat().st_size == record["bytes"] and file_sha256(shard) == record["sha256"]:
        return record
    logger.warning("%s: differs from its record, and is written again", shard)
    _record_path(shard).unlink()
    return None


def wait_for_records(shards: Sequence[Path]) -> list[Record]:
    """Return the records of all `shards`. Wait for the shards of other processes."""
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
