"""Pictures and captions to shards of posteriors and text embeddings.

A sample `<key>` is `<key>.f8.npy`, the posterior's parameters float16 (2C, height/8, width/8), unscaled;
`<key>.t5.npy`, the text encoder's output float16 (77, 768); `<key>.txt`; and `<key>.json`, where it comes from.

A shard holds the readable ones of a fixed range of the input's pictures, and depends on nothing else. So shards can be
made by several processes, in any order, and after an interruption, and are always the same. The index has, beside what
`ldm.shards.index` says,

    made_from           the settings, the digests of the weights and of the list of pictures: what must be the same to
                        go on with an unfinished set
    pictures, without_caption, failed   counts, and name and reason of each picture that could not be read
    sizes, f8, t5       samples by the size (height x width) of their pictures, and the shapes of what is stored
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.distributed.ranks import Ranks
from ldm.encoding.encoder import Encoder
from ldm.encoding.jobs import Record, plan_shards, take_up, wait_for_records, write_record
from ldm.encoding.pipeline import encode_shards
from ldm.encoding.shard_set import RESUMABLE, begin, check_out, finish, goes_on, locked_set, stop, wait_for_begin
from ldm.images.buckets import Size, bucket_sizes
from ldm.images.find import ImageItem, digest_images
from ldm.util import UserError

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What became of the pictures of some shards."""

    samples: int = 0
    pictures: int = 0
    without_caption: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)  # name and reason
    sizes: Counter[str] = field(default_factory=Counter)  # samples by height x width of their pictures
    f8: list[tuple[int, ...]] = field(default_factory=list)  # shapes
    shards: list[Record] = field(default_factory=list)  # name, samples, bytes, sha256; of those with samples

    @classmethod
    def of(cls, records: Iterable[Record]) -> Report:
        """The sum of what the records of shards say."""
        report = cls()
        for record in records:
            report.samples += record["samples"]
            report.pictures += record["pictures"]
            report.without_caption += record["without_caption"]
            report.failed += record["failed"]
            report.sizes += Counter(record["sizes"])
            report.f8 = sorted({tuple(shape) for shape in [*report.f8, *record["f8"]]})
            if record["samples"]:
                report.shards.append({key: record[key] for key in ("name", "samples", "bytes", "sha256")})
        return report


@dataclass
class _SetInMaking:
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


def _open_set(out: str, made_from: Mapping[str, Any], overwrite: bool, ranks: Ranks) -> _SetInMaking | None:
    """The set to begin, or to go on with; None if rank 0 has finished it without this process."""
    assert ranks.world == 1 or not overwrite, "none of several processes may remove what others write"
    if ranks.rank > 0:
        return _SetInMaking(out, made_from, begun=True) if wait_for_begin(out, made_from) else None
    check_out(out, overwrite, resumable=True)
    making = _SetInMaking(out, made_from, begun=not overwrite and goes_on(out, made_from))
    if ranks.world > 1:
        making.prepare()  # the others wait for it
    return making


def preencode(
    encoder: Encoder,
    items: Sequence[ImageItem],
    out: str,
    *,
    size: int = 512,
    buckets: bool = False,
    batch_size: int = 8,
    shard_size: int = 1000,
    flip: bool = False,
    workers: int = 0,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> Report:
    """Write the shards of `out`, and beside them the empty caption's encoding and `index.json`, last.

    An unfinished set that the same arguments began is taken up: its finished shards are verified and kept. Of several
    processes with one `out` each makes its share of the shards; rank 0 waits for all and then writes the index.

    Args:
        size: pixels a side of the square that pictures are cropped to; with `buckets`, see `bucket_sizes`.
        shard_size: samples in a shard; a picture and its mirror image are not parted.
        workers: processes that decode pictures.
        overwrite: begin anew, whatever is there; for a process alone.
        ranks: which process this is; by default, the only one.

    Returns:
        What became of all pictures; of a rank above 0, what became of its own.

    Raises:
        UserError: shards are there already, or an unfinished set of something else; no picture can be read; or a value
            does not fit in float16.
    """
    ranks = ranks or Ranks()
    sizes = bucket_sizes(size) if buckets else [(size, size)]
    encoder.check_sizes(sizes)
    shards = plan_shards(out, len(items), max(1, shard_size // (2 if flip else 1)))
    settings = {"size": size, "buckets": buckets, "flip": flip, "shard_size": shard_size}
    made_from = {
        "out": Path(out).name,
        **settings,
        "precision": str(encoder.dtype).removeprefix("torch."),
        **encoder.digests,
        "pictures": digest_images(items),
    }
    with locked_set(out) if ranks.rank == 0 else nullcontext():  # for the others too
        return _make(encoder, items, out, shards, sizes, batch_size, settings, workers, overwrite, ranks, made_from)


def _make(
    encoder: Encoder,
    items: Sequence[ImageItem],
    out: str,
    shards: Sequence[tuple[Path, range]],
    sizes: Sequence[Size],
    batch_size: int,
    settings: Mapping[str, Any],
    workers: int,
    overwrite: bool,
    ranks: Ranks,
    made_from: Mapping[str, Any],
) -> Report:
    null = encoder.captions([""])[0]
    making = _open_set(out, made_from, overwrite, ranks)
    if making is None:
        return Report()
    mine = [path for path, _ in ranks.share(shards)]
    making.take_up(mine)
    missing = [(path, numbers) for path, numbers in ranks.share(shards) if path not in making.records]
    try:
        encode_shards(
            encoder, items, missing, sizes, batch_size, settings["flip"], workers, making.prepare, making.keep
        )
        if ranks.rank > 0:
            return Report.of(making.records[path] for path in mine)
        others = [path for path, _ in shards if path not in making.records]
        records = making.records | dict(zip(others, wait_for_records(others), strict=True))
        report = Report.of(records[path] for path, _ in shards)
        if not report.pictures:
            raise UserError(f"none of {len(items)} pictures can be read; the first: {report.failed[0]['reason']}")
    except BaseException as error:
        if ranks.world == 1:
            stop(out, interrupted=isinstance(error, KeyboardInterrupt))
        raise
    finish(
        out,
        null,
        report.shards,
        samples=report.samples,
        pictures=report.pictures,
        without_caption=report.without_caption,
        failed=report.failed,
        **settings,
        sizes=dict(sorted(report.sizes.items())),
        f8=report.f8,
        t5=list(null.shape),
        scale_factor=float(encoder.model.scale_factor),
        **encoder.digests,
        **{RESUMABLE: made_from},
    )
    return report
