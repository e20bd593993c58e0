"""Writer of a set of shards, by one process or several, from the start or resumed.

Pre-encoding and prior generation both write their sets with `SetWriter`. Each job makes one shard, and a shard depends
on its own job only. The set is therefore the same for any number of processes, order of jobs and interruptions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.distributed.ranks import Ranks
from ldm.encoding.jobs import Record, verified_record, wait_for_records, write_record
from ldm.encoding.shard_set import RESUMABLE, begin, can_resume, check_out, finish, locked_set, stop, wait_for_begin
from ldm.shards.index import REPEATS
from ldm.shards.kept_tables import keep_tables
from ldm.shards.writer import existing_shards
from ldm.util import UserError

logger = logging.getLogger(__name__)

Job = tuple[Any, ...]  # the path of a shard, the numbers of its images or prompts, and more
_INDEXED = ("name", "samples", "bytes", "sha256", REPEATS)


def indexed(record: Record) -> Record:
    """Return the entries of a record that the index repeats."""
    return {key: record[key] for key in _INDEXED if key in record}


@dataclass
class SetWriter:
    """This process's part in writing the shards of `jobs` to the pattern `out`.

    Jobs that are no sequence are taken one by one. What they are made from is then known at their end alone, so each
    record has its own part of that, see `check`.

    Args:
        made_from: the settings and digests that must be equal for an unfinished set to be resumed.
        overwrite: replace an existing set. Allowed for a single process only.
        ranks: this process and the number of processes.
        check: called with the path and the record of each shard that an earlier run or another process finished. It
            raises `UserError` if the shard is made from something else.
    """

    out: str
    made_from: Mapping[str, Any]
    jobs: Iterable[Job]
    overwrite: bool = False
    ranks: Ranks = Ranks()  # noqa: RUF009 - frozen
    check: Callable[[Path, Record], None] = lambda path, record: None
    begun: bool = field(default=False, init=False)  # the index of the folder marks this set as unfinished
    records: dict[Path, Record] = field(default_factory=dict, init=False)  # of the finished shards, by path

    def __post_init__(self) -> None:
        assert self.ranks.world == 1 or not self.overwrite, "with several processes, none may remove shards"
        self.made_from = {"out": Path(self.out).name, **self.made_from}

    def prepare(self) -> None:
        """Begin the set and remove the existing one. Call this once the first shard is certain to have content."""
        if not self.begun:
            begin(self.out, self.made_from)
            self.begun = True

    def keep(self, shard: Path, record: Record) -> None:
        """Store the `record` of the finished `shard`."""
        self.records[shard] = record
        if self.begun:
            write_record(shard, record)

    def write(
        self,
        nulls: Callable[[Sequence[Record]], Mapping[str, np.ndarray]],
        write_shards: Callable[[Iterable[Job]], None],
        describe: Callable[[Sequence[Record]], Mapping[str, Any]],
        made_from: Callable[[], Mapping[str, Any]] = dict,
    ) -> list[Record]:
        """Write the unfinished shards, then the files `null.*.npy`, then the index.

        Args:
            nulls: returns the arrays of `null_path` by key, from the records of all shards.
            write_shards: writes the shards of the given jobs. It calls `prepare` before it opens the first file, and
                `keep` after each shard.
            describe: returns entries of the index, from the records of all shards. It may raise `UserError`.
            made_from: returns what is known at the end of the jobs alone of the settings and digests.

        Returns:
            The records of all shards on rank 0, and of this rank's shards on the others.

        Raises:
            UserError: the folder holds another set, or an unfinished set with other settings.
        """
        with locked_set(self.out) if self.ranks.rank == 0 else nullcontext():  # rank 0 holds the lock for all
            if not self._open():
                return []
            try:
                records = self._write_shards(write_shards)
                if self.ranks.rank > 0:
                    return records
                about, beside = describe(records), nulls(records)
            except BaseException as error:
                if self.ranks.world == 1:
                    stop(self.out, interrupted=isinstance(error, KeyboardInterrupt))
                raise
            shards = [indexed(record) for record in records if record["samples"]]
            finish(self.out, beside, shards, **about, **{RESUMABLE: {**self.made_from, **made_from()}})
            keep_tables([Path(self.out).parent / shard["name"] for shard in shards])
            return records

    def _open(self) -> bool:
        """Begin or resume the set. Return False if rank 0 has already finished it."""
        if self.ranks.rank > 0:
            self.begun = wait_for_begin(self.out, self.made_from, isinstance(self.jobs, Sequence))
            return self.begun
        check_out(self.out, self.overwrite)
        self.begun = not self.overwrite and can_resume(self.out, self.made_from)
        if self.ranks.world > 1:
            self.prepare()  # the other ranks wait for it
        return True

    def _write_shards(self, write_shards: Callable[[Iterable[Job]], None]) -> list[Record]:
        """Write this rank's unfinished shards. Return its records, and on rank 0 those of all ranks."""
        if isinstance(self.jobs, Sequence):
            share = [path for path, *_ in self.ranks.share(self.jobs)]
            self._resume(share)
            paths = [path for path, *_ in self.jobs]
            write_shards([job for job in self.ranks.share(self.jobs) if job[0] not in self.records])
        else:
            paths = []
            write_shards(self._missing(paths))
            share = list(self.ranks.share(paths))
            self._check_rest(paths)
        if self.ranks.rank > 0:
            return [self.records[path] for path in share]
        others = [path for path in paths if path not in self.records]
        found = dict(zip(others, wait_for_records(others), strict=True))
        for path, record in found.items():
            self.check(path, record)
        records = self.records | found
        return [records[path] for path in paths]

    def _check_rest(self, paths: Sequence[Path]) -> None:
        """Raise `UserError` if an earlier run wrote further shards than `paths`."""
        further = sorted(set(existing_shards(self.out)) - set(paths))
        if further:
            raise UserError(
                f"{further[0]}: the unfinished set was begun with more images; give the same command to resume it, or "
                "--overwrite to start again"
            )

    def _missing(self, paths: list[Path]) -> Iterator[Job]:
        """Yield this rank's unfinished jobs. Add the shards of all ranks to `paths`."""
        told = False
        for number, job in enumerate(self.jobs):
            paths.append(job[0])
            if number % self.ranks.world != self.ranks.rank:
                continue
            self._resume([job[0]], quiet=True)
            if job[0] in self.records:
                continue
            if self.records and not told:
                logger.info("resuming: the first %d shards of this process are finished", len(self.records))
            told = True
            yield job

    def _resume(self, shards: Sequence[Path], quiet: bool = False) -> None:
        """Keep the records of those `shards` that an earlier run finished."""
        found = {path: verified_record(path) for path in shards if self.begun}
        kept = {path: record for path, record in found.items() if record is not None}
        for path, record in kept.items():
            self.check(path, record)
        self.records |= kept
        if kept and not quiet:
            logger.info("resuming: %d of %d shards are finished", len(kept), len(shards))
