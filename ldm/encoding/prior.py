"""Shards of a prior, whose samples come from `ldm.encoding.prior_samples`.

A sample has the members that `ldm.encoding.preencode` writes, with two differences. It holds one latent, float16
(C, h, w), unscaled, in place of a posterior. A teacher adds members; see `ldm.encoding.teacher`. The sample's `json`
holds its prompt, seed and the sampler's settings, or the key of its image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.checkpoint.digest import weights_digest
from ldm.checkpoint.keys import EMA, MODEL
from ldm.distributed.ranks import Ranks
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.jobs import Record, plan_shards
from ldm.encoding.prior_samples import PriorSample, Source
from ldm.encoding.set_writer import Job, SetWriter
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.shards.index import MEMBERS
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import LATENT
from ldm.shards.verify import file_sha256, indexed_sha256
from ldm.shards.writer import Shard


def digest_of(*content: Any) -> str:
    """Return the SHA-256, in hex, of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def unet_digests(model: LatentDiffusion) -> dict[str, str | None]:
    """Return digests of the UNet's weights and of its EMA weights (None if absent), by name."""
    prefixes = {"unet": MODEL, "unet_ema": EMA}
    return {name: weights_digest(model.state_dict(), prefix) for name, prefix in prefixes.items()}


def digest_shards(dataset: ShardDataset) -> str:
    """Return the SHA-256, in hex, of the sample keys of `dataset` and of the names and contents of its shards.

    Only shards without a checksum in their index are read. `open_shards` has compared the others with theirs.
    """
    known = {folder: indexed_sha256(folder) for folder in {path.parent for path in dataset.paths}}
    shards = [[path.name, known[path.parent].get(path.name) or file_sha256(path)] for path in dataset.paths]
    return digest_of(list(dataset.sample_keys), shards)


def make_prior(
    encoder: SampleEncoder,
    source: Source,
    count: int,
    out: str,
    *,
    made_from: Mapping[str, Any],
    batch_size: int = 4,
    shard_size: int = 1000,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    **about: Any,
) -> list[Record]:
    """Write the `count` samples of `source` to the shards of the pattern `out`.

    An unfinished set of the same arguments is resumed. Several processes share the shards, as in
    `ldm.encoding.preencode`.

    Args:
        made_from: settings and digests that `source` depends on, except for the weights of the encoders. They, `about`
            and `shard_size` must be equal for an unfinished set to be resumed.
        batch_size: samples per batch. The samples of a batch share a shard.
        about: further entries of the index.

    Returns:
        The records of all shards on rank 0, and of this rank's shards on the others.

    Raises:
        UserError: the folder holds another set, or an unfinished set with other settings; or a value does not fit in
            float16.
    """
    nulls = encoder.captions([""])[0].arrays
    asked = {**made_from, **about, "shard_size": shard_size, "precision": str(encoder.dtype).removeprefix("torch.")}
    jobs = plan_shards(out, count, shard_size)
    writer = SetWriter(out, {**asked, **encoder.encoding_identity}, jobs, overwrite, ranks or Ranks())

    def write_shards(missing: Sequence[Job]) -> None:
        parts = [list(_parts(numbers, batch_size)) for _, numbers in missing]
        batches = source([part for ours in parts for part in ours])
        total = sum(len(numbers) for _, numbers in missing)
        with logging_redirect_tqdm(), tqdm(total=total, unit="sample", desc="prior") as bar:
            for (path, _), ours in zip(missing, parts, strict=True):
                writer.keep(path, _write_shard(path, islice(batches, len(ours)), writer, bar))

    index = {
        **{"samples": count, **about, MEMBERS: [LATENT, *nulls]},
        **{**encoder.described, "parameterization": encoder.model.parameterization},
    }
    return writer.write(lambda _: nulls, write_shards, lambda _: index)


def _parts(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _write_shard(path: Path, batches: Iterator[list[PriorSample]], writer: SetWriter, bar: tqdm) -> Record:
    """Write the samples of `batches` to the shard at `path`. Return its record."""
    samples = next(batches)
    writer.prepare()  # after the first batch, so that a failure before it keeps the old set
    with Shard(path) as shard:
        while samples:
            for sample in samples:
                shard.write(sample.key, sample.members())
            bar.update(len(samples))
            samples = next(batches, None)
    return shard.entry
