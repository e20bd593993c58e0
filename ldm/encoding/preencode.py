"""Images and captions to shards of posteriors and text encodings.

The members of a sample are those of `ldm.shards.sample`: the posterior's parameters float16 (2C, height/8, width/8),
unscaled; the text encoder's outputs, such as float16 (77, 768); the caption; and where the image comes from.

A shard holds the readable ones of a fixed range of the input's images, and depends on nothing else. So shards can be
made by several processes, in any order, and after an interruption, and are always the same. The index has, beside what
`ldm.shards.index` says,

    made_from           the settings, the digests of the weights and of the list of images: what must be the same to
                        go on with an unfinished set
    images, without_caption, captions_cut   counts
    failed, cut         name and reason of each image that could not be read; name and tokens of each caption that is
                        longer than the text encoder reads
    sizes, f8, t5       samples by the size (height x width) of their images, and the shapes of what is stored
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.distributed.ranks import Ranks
from ldm.encoding.encoder import Encoder
from ldm.encoding.jobs import Record, plan_shards
from ldm.encoding.making import INDEXED, Job, Making, make_set
from ldm.encoding.pipeline import encode_shards
from ldm.images.buckets import bucket_sizes
from ldm.images.find import ImageItem, digest_images
from ldm.shards.index import INDEX
from ldm.shards.sample import LATENT, index_shapes
from ldm.util import UserError

logger = logging.getLogger(__name__)

_NAMED = 5  # images that a warning names


@dataclass
class Report:
    """What became of the images of some shards."""

    samples: int = 0
    images: int = 0
    without_caption: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)  # name and reason
    cut: list[dict[str, Any]] = field(default_factory=list)  # name and tokens of captions that are too long
    sizes: Counter[str] = field(default_factory=Counter)  # samples by height x width of their images
    f8: list[tuple[int, ...]] = field(default_factory=list)  # shapes
    shards: list[Record] = field(default_factory=list)  # name, samples, bytes, sha256; of those with samples

    @classmethod
    def of(cls, records: Iterable[Record]) -> Report:
        """The sum of what the records of shards say."""
        report = cls()
        for record in records:
            report.samples += record["samples"]
            report.images += record["images"]
            report.without_caption += record["without_caption"]
            report.failed += record["failed"]
            report.sizes += Counter(record["sizes"])
            report.cut += record.get("cut", [])
            report.f8 = sorted({tuple(shape) for shape in [*report.f8, *record[LATENT]]})
            if record["samples"]:
                report.shards.append({key: record[key] for key in INDEXED})
        return report


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
        size: pixels a side of the square that images are cropped to; with `buckets`, see `bucket_sizes`.
        shard_size: samples in a shard; an image and its mirror image are not parted.
        workers: processes that decode images.
        overwrite: begin anew, whatever is there; for a process alone.
        ranks: which process this is; by default, the only one.

    Returns:
        What became of all images; of a rank above 0, what became of its own.

    Raises:
        UserError: shards are there already, or an unfinished set of something else; no image can be read; or a value
            does not fit in float16.
    """
    sizes = bucket_sizes(size) if buckets else [(size, size)]
    encoder.check_sizes(sizes)
    shards = plan_shards(out, len(items), max(1, shard_size // (2 if flip else 1)))
    settings = {"size": size, "buckets": buckets, "flip": flip, "shard_size": shard_size}
    made_from = {
        **settings,
        "precision": str(encoder.dtype).removeprefix("torch."),
        **encoder.digests,
        "images": digest_images(items),
    }
    nulls = encoder.captions([""])[0].arrays

    def write(missing: Sequence[Job], making: Making) -> None:
        encode_shards(encoder, items, missing, sizes, batch_size, flip, workers, making.prepare, making.keep)

    def describe(records: Sequence[Record]) -> dict[str, Any]:
        report = Report.of(records)
        if not report.images:
            raise UserError(f"none of {len(items)} images can be read; the first: {report.failed[0]['reason']}")
        return {
            "samples": report.samples,
            "images": report.images,
            "without_caption": report.without_caption,
            "captions_cut": len(report.cut),
            "failed": report.failed,
            "cut": report.cut,
            **settings,
            "sizes": dict(sorted(report.sizes.items())),
            **index_shapes(report.f8, nulls),
            "scale_factor": float(encoder.model.scale_factor),
            **encoder.digests,
        }

    report = Report.of(make_set(out, made_from, shards, nulls, write, describe, overwrite, ranks))
    if report.cut:
        shown = ", ".join(f"{entry['name']} ({entry['tokens']})" for entry in report.cut[:_NAMED])
        more = f" and {len(report.cut) - _NAMED} more, see {INDEX}" if len(report.cut) > _NAMED else ""
        logger.warning(
            "%d captions have more tokens than are read, the rest is cut: %s%s", len(report.cut), shown, more
        )
    return report
