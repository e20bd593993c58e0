"""Making a set of shards by jobs of one shard each, by one process or several, anew or going on with an unfinished set.

Pre-encoding and prior generation both write their sets by `make_set`. A shard depends on its own job alone, so a set
is the same whoever makes its shards, in whatever order, after however many interruptions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.distributed.ranks import Ranks
from ldm.encoding.jobs import Record, take_up, wait_for_records, write_record
from ldm.encoding.shard_set import RESUMABLE, begin, check_out, finish, goes_on, locked_set, stop, wait_for_begin

logger = logging.getLogger(__name__)

Job = tuple[Path, range]  # a shard, and the numbers of what it is made of
INDEXED = ("name", "samples", "bytes", "sha256")  # entries of a record that the index takes over


@dataclass
class Making:
    """This process's part of a set: whether the set's folder is marked as its own, and its records of shards."""

    out: str
    made_from: Mapping[str, Any]
    begun: bool
    records: dict[Path, Record] = field(default_factory=dict)

    def take_up(self, shards: Sequence[Path]) -> None:
        """Take over those of `shards` that an earlier run finished."""
        found = {path: take_up(path) for path in shards if self.begun}
        self.records = {path: record for path, record in found.items() if record is not None}
        if self.records:
            logger.info("going on: %d of %d shards are finished", len(self.records), len(shards))

    def prepare(self) -> None:
        """Begin the set, now that it is sure that there will be one to replace the old one."""
        if not self.begun:
            begin(self.out, self.made_from)
            self.begun = True

    def keep(self, shard: Path, record: Record) -> None:
        """Note that `shard` is finished."""
        self.records[shard] = record
        if self.begun:
            write_record(shard, record)


def _open(out: str, made_from: Mapping[str, Any], overwrite: bool, ranks: Ranks) -> Making | None:
    """Return the set to begin, or to go on with; None if rank 0 has finished it without this process."""
    assert ranks.world == 1 or not overwrite, "none of several processes may remove what others write"
    if ranks.rank > 0:
        return Making(out, made_from, begun=True) if wait_for_begin(out, made_from) else None
    check_out(out, overwrite)
    making = Making(out, made_from, begun=not overwrite and goes_on(out, made_from))
    if ranks.world > 1:
        making.prepare()  # the others wait for it
    return making


def make_set(
    out: str,
    made_from: Mapping[str, Any],
    jobs: Sequence[Job],
    nulls: Mapping[str, np.ndarray],
    write: Callable[[Sequence[Job], Making], None],
    describe: Callable[[Sequence[Record]], Mapping[str, Any]],
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> list[Record]:
    """Make the shards of `jobs` that are not finished, and last the encodings of the empty caption and the index.

    Args:
        made_from: what must be the same to go on with an unfinished set, `Path(out).name` aside.
        nulls: the encodings of the empty caption, by member.
        write: makes shards; calls `prepare` of the set before it opens the first file, and `keep` for each finished
            shard.
        describe: entries of the index, from the records of all shards; may refuse the set.

    Returns:
        The records of all shards; of a rank above 0, those of its own.

    Raises:
        UserError: shards are there already, or an unfinished set of something else.
    """
    ranks, made_from = ranks or Ranks(), {"out": Path(out).name, **made_from}
    with locked_set(out) if ranks.rank == 0 else nullcontext():  # the first process holds it for the others
        return _make_set(out, made_from, jobs, nulls, write, describe, overwrite, ranks)


def _make_set(
    out: str,
    made_from: Mapping[str, Any],
    jobs: Sequence[Job],
    nulls: Mapping[str, np.ndarray],
    write: Callable[[Sequence[Job], Making], None],
    describe: Callable[[Sequence[Record]], Mapping[str, Any]],
    overwrite: bool,
    ranks: Ranks,
) -> list[Record]:
    making = _open(out, made_from, overwrite, ranks)
    if making is None:
        return []
    mine = [path for path, _ in ranks.share(jobs)]
    making.take_up(mine)
    try:
        write([job for job in ranks.share(jobs) if job[0] not in making.records], making)
        if ranks.rank > 0:
            return [making.records[path] for path in mine]
        others = [path for path, _ in jobs if path not in making.records]
        found = making.records | dict(zip(others, wait_for_records(others), strict=True))
        records = [found[path] for path, _ in jobs]
        about = describe(records)
    except BaseException as error:
        if ranks.world == 1:
            stop(out, interrupted=isinstance(error, KeyboardInterrupt))
        raise
    shards = [{key: record[key] for key in INDEXED} for record in records if record["samples"]]
    finish(out, nulls, shards, **about, **{RESUMABLE: made_from})
    return records
