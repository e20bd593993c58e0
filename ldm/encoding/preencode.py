"""Pre-encoding of images and captions into shards of posteriors and text encodings.

`ldm.shards.sample` lists the members of a sample: the posterior's parameters, float16 (2C, height/8, width/8),
unscaled; the outputs of the text encoders, such as float16 (77, 768); the caption; the origin of the image; and
further conditioning by the kind of model, see `ldm.encoding.kinds`.

A shard holds the readable images of a fixed range of the input, and depends on nothing else. Several processes can
therefore write shards in any order, also after an interruption, with the same result. The index has the entries of
`ldm.shards.index`, and

    made_from           settings, and digests of the weights and of the list of images; they must be equal for an
                        unfinished set to be resumed. Images that are read as a stream are compared shard by shard
    images, without_caption, captions_cut   counts
    without_mask        with --loss-masks, number of images without a mask
    failed              name and reason of each image that could not be read
    cut                 name and tokens of each caption that is longer than the text encoder's limit
    sizes               samples per image size (height x width)
    masks               number per sample, for inpainting
    f8, t5, pooled      shapes of the stored arrays, of one variant and caption
    loss_masks          true if the samples have loss masks
    variants, variant_area, variant_jitter  number per image, and settings of `ldm.encoding.variants`
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.distributed.ranks import Ranks
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.image_stream import ImageStream
from ldm.encoding.jobs import Record
from ldm.encoding.kinds import ImageSamples, samples_for
from ldm.encoding.loss_masks import LossMaskSamples
from ldm.encoding.pipeline import encode_shards
from ldm.encoding.plans import ListedPlan, StreamedPlan
from ldm.encoding.set_writer import Job, SetWriter, indexed
from ldm.encoding.variants import Variants, VariantSamples
from ldm.images.buckets import bucket_sizes
from ldm.images.find import ImageItem
from ldm.shards.index import INDEX, MEMBERS, SEVERAL_CAPTIONS
from ldm.shards.sample import LATENT, index_shapes
from ldm.util import UserError

logger = logging.getLogger(__name__)

_NAMED = 5  # images listed in a warning
_PLAIN = Variants()


@dataclass
class Report:
    """Counts and failures of encoded shards."""

    samples: int = 0
    images: int = 0
    without_caption: int = 0
    without_mask: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)  # name and reason
    cut: list[dict[str, Any]] = field(default_factory=list)  # name and tokens of truncated captions
    sizes: Counter[str] = field(default_factory=Counter)  # samples per height x width
    f8: list[tuple[int, ...]] = field(default_factory=list)  # shapes of the stored posteriors or latents
    shards: list[Record] = field(default_factory=list)  # entries of the index for each shard that has samples

    @classmethod
    def of(cls, records: Iterable[Record]) -> Report:
        """Return the sum of the `records` of shards."""
        report = cls()
        for record in records:
            report.samples += record["samples"]
            report.images += record["images"]
            report.without_caption += record["without_caption"]
            report.without_mask += record.get("without_mask", 0)
            report.failed += record["failed"]
            report.sizes += Counter(record["sizes"])
            report.cut += record.get("cut", [])
            report.f8 = sorted({tuple(shape) for shape in [*report.f8, *record[LATENT]]})
            if record["samples"]:
                report.shards.append(indexed(record))
        return report

    def counts(self) -> dict[str, Any]:
        """Return the counts, the failures, the truncated captions and the sizes as entries of the index."""
        return {
            "samples": self.samples,
            "images": self.images,
            "without_caption": self.without_caption,
            **({"without_mask": self.without_mask} if self.without_mask else {}),
            "captions_cut": len(self.cut),
            "failed": self.failed,
            "cut": self.cut,
            "sizes": dict(sorted(self.sizes.items())),
        }

    def checked(self) -> Report:
        """Return this report. Raise `UserError` if no image can be read."""
        if not self.images:
            raise UserError(f"none of {len(self.failed)} images can be read; the first: {self.failed[0]['reason']}")
        return self

    def warn(self) -> None:
        """Log images without a loss mask, and captions that are longer than the text encoder's limit, if any."""
        if self.without_mask:
            logger.warning("%d of %d images have no mask, and are trained as a whole", self.without_mask, self.images)
        if self.cut:
            shown = ", ".join(f"{entry['name']} ({entry['tokens']})" for entry in self.cut[:_NAMED])
            more = f" and {len(self.cut) - _NAMED} more, see {INDEX}" if len(self.cut) > _NAMED else ""
            logger.warning(
                "%d captions have more tokens than the text encoder reads and are cut: %s%s",
                len(self.cut),
                shown,
                more,
            )


def preencode(
    encoder: SampleEncoder,
    items: Sequence[ImageItem] | ImageStream,
    out: str,
    *,
    size: int = 512,
    buckets: bool = False,
    batch_size: int = 8,
    shard_size: int = 1000,
    flip: bool = False,
    masks: int | None = None,
    loss_masks: bool = False,
    variants: Variants = _PLAIN,
    workers: int = 0,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> Report:
    """Write `items` to the shards of the pattern `out`, and the empty caption's encoding and `index.json` beside them.

    An unfinished set of the same arguments is resumed: its finished shards are verified and kept. With several
    processes, each writes its share of the shards. Rank 0 waits for all of them and then writes the index.

    Args:
        items: the images. A stream is read once, while its shards are written; `out` must be an unlimited pattern.
        size: side in pixels of the square that images are cropped to; with `buckets`, see `bucket_sizes`.
        shard_size: samples per shard. An image and its mirror image share a shard.
        masks: masks per sample for an inpainting model. The default is `ldm.encoding.kinds.MASKS`.
        loss_masks: store the loss masks of the images.
        variants: variants of each image.
        workers: processes that decode images.
        overwrite: replace an existing set; for a single process only.
        ranks: this process and the number of processes; by default, a single process.

    Returns:
        The report on all images, or above rank 0 on this rank's images.

    Raises:
        UserError: the folder holds another set, or an unfinished set with other settings; no image can be read; a
            value does not fit in float16; or no kind of sample matches the model.
    """
    kind = _kind_of(encoder, masks, flip, loss_masks, variants)
    sizes = bucket_sizes(size) if buckets else [(size, size)]
    encoder.check_sizes(sizes)
    several = items.has_several if isinstance(items, ImageStream) else any("\n" in (i.caption or "") for i in items)
    settings = {
        **{"size": size, "buckets": buckets, "flip": flip, "shard_size": shard_size},
        **({SEVERAL_CAPTIONS: True} if several else {}),
        **kind.settings,
    }
    precision = {"precision": str(encoder.dtype).removeprefix("torch.")}
    planned = _plan(items, out, max(1, shard_size // (2 if flip else 1)))
    made_from = {**settings, **precision, **encoder.encoding_identity, **planned.known()}
    nulls = encoder.captions([""])[0].arrays
    writer = SetWriter(out, made_from, planned.jobs, overwrite, ranks or Ranks(), planned.check)

    def keep(path: Path, record: Record) -> None:
        writer.keep(path, planned.noted(path, record))

    def write_shards(missing: Iterable[Job]) -> None:
        encode_shards(encoder, kind, missing, several, sizes, batch_size, flip, workers, writer.prepare, keep)

    def with_blanks(records: Sequence[Record]) -> dict[str, np.ndarray]:
        found = (tuple(map(int, name.split("x"))) for name in sorted(Report.of(records).sizes))
        return {**nulls, **kind.blanks(encoder, found)}

    def describe(records: Sequence[Record]) -> dict[str, Any]:
        found, members = Report.of(records).checked(), {MEMBERS: [*kind.members, *nulls]}
        return {**found.counts(), **settings, **index_shapes(found.f8, nulls), **members, **encoder.described}

    report = Report.of(writer.write(with_blanks, write_shards, describe, planned.found))
    report.warn()
    return report


def _plan(items: Sequence[ImageItem] | ImageStream, out: str, shard_size: int) -> ListedPlan | StreamedPlan:
    return (
        StreamedPlan(items, out, shard_size) if isinstance(items, ImageStream) else ListedPlan(items, out, shard_size)
    )


def _kind_of(
    encoder: SampleEncoder, masks: int | None, flip: bool, loss_masks: bool, variants: Variants
) -> ImageSamples:
    kind = samples_for(encoder.model, masks, flip)
    if variants.count > 1:
        kind = VariantSamples(kind, variants)
    return LossMaskSamples(kind, encoder.model.first_stage_model.downsampling) if loss_masks else kind
