"""Plans of a set: which shards it has, and what the images are, so that an unfinished set resumes with the same ones.

A list of images is known as a whole before the first shard. A stream is known at its end, so each record has the digest
of its own images. In the end, the indexes of both are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.encoding.image_stream import ImageStream
from ldm.encoding.jobs import MADE_FROM, ImageJob, Record, jobs_of, stream_jobs
from ldm.images.find import ImageItem, described, digest_images
from ldm.shards.index import REPEATS
from ldm.util import refuse_if

_IMAGES = "images"


class ListedPlan:
    """Plan of a list of images."""

    def __init__(self, items: Sequence[ImageItem], out: str, shard_size: int) -> None:
        self._items = items
        self.jobs = jobs_of(out, items, shard_size)

    def known(self) -> dict[str, Any]:
        """Return what an unfinished set must have been made from."""
        repeated = {REPEATS: True} if any(item.repeats != 1 for item in self._items) else {}
        return {**repeated, _IMAGES: digest_images(self._items)}

    def found(self) -> dict[str, Any]:
        """Return what is known at the end of the jobs alone."""
        return {}

    def noted(self, path: Path, record: Record) -> Record:
        """Return the `record` of the shard at `path` with what `check` needs."""
        return record

    def check(self, path: Path, record: Record) -> None:
        """Raise `UserError` if the record of an earlier run or another process is of other images."""


class StreamedPlan:
    """Plan of a stream of images; see `ListedPlan`."""

    def __init__(self, items: ImageStream, out: str, shard_size: int) -> None:
        self._hashed = hashlib.sha256()
        self._digests: dict[Path, str] = {}
        self._has_repeats = False
        self.jobs = self._noting(stream_jobs(out, items, shard_size))

    def _noting(self, jobs: Iterator[ImageJob]) -> Iterator[ImageJob]:
        for job in jobs:
            own = hashlib.sha256()
            for item in job.items:
                line = described(item)
                self._hashed.update(line)
                own.update(line + b"%d" % item.repeats)
                self._has_repeats |= item.repeats != 1
            self._digests[job.path] = own.hexdigest()
            yield job

    def known(self) -> dict[str, Any]:
        return {}

    def found(self) -> dict[str, Any]:
        return {**({REPEATS: True} if self._has_repeats else {}), _IMAGES: self._hashed.hexdigest()}

    def noted(self, path: Path, record: Record) -> Record:
        return {**record, MADE_FROM: self._digests[path]}

    def check(self, path: Path, record: Record) -> None:
        refuse_if(
            record.get(MADE_FROM) != self._digests[path],
            f"{path}: the unfinished set was begun with other images or captions; give the same command to resume "
            "it, or --overwrite to start again",
        )
