"""Shards of a prior: latents sampled by a released model, or the latents of a pre-encoded set of images.

A sample has the members that `ldm.encoding.preencode` writes, with two differences. It holds one latent, float16
(C, h, w), unscaled, in place of a posterior. A teacher adds members; see `ldm.encoding.teacher`. The sample's `json`
holds the sampler's settings.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.checkpoint.digest import weights_digest
from ldm.checkpoint.keys import EMA, MODEL
from ldm.data.dropout import CaptionDropout
from ldm.distributed.ranks import Ranks
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.jobs import Record, plan_shards
from ldm.encoding.read import sample_key
from ldm.encoding.set_writer import Job, SetWriter
from ldm.encoding.teacher import Teacher
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.text_to_image import Request, sample_batches
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.shards.index import MEMBERS
from ldm.shards.open import check_encoders, common_caption_settings, open_shards
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import (
    CAPTION,
    CONTEXT,
    LATENT,
    ORIGIN,
    SIZE_ENTRIES,
    SIZES,
    STORED,
    TEXT_ENCODINGS,
    encode_members,
    sizes_of,
)
from ldm.shards.writer import Shard, existing_shards
from ldm.util import UserError, refuse_if


@dataclass
class PriorSample:
    """Sample that is not yet written. `number` is its position in the set."""

    number: int
    key: str
    latent: np.ndarray  # C h w, float16, unscaled
    encodings: dict[str, np.ndarray]  # of the caption, by member, float16
    caption: str
    origin: Mapping[str, Any]
    answers: Mapping[str, np.ndarray] = field(default_factory=dict)  # the teacher's members

    def conditions(self, size_entries: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the encodings by member, and sizes (2,) by the names in `size_entries`."""
        sizes = {entry: np.array(self.origin[SIZE_ENTRIES[entry]], np.float32) for entry in size_entries}
        return {**self.encodings, **sizes}

    def members(self) -> dict[str, bytes]:
        return encode_members(self.latent, self.encodings, self.caption, self.origin, self.answers)


# Called with ranges of sample numbers. Yields the samples of each range.
Source = Callable[[Sequence[range]], Iterator[list[PriorSample]]]


def sampled(
    encoder: SampleEncoder, requests: Sequence[Request], shape: tuple[int, int, int], settings: Mapping[str, Any]
) -> Source:
    """Return a source of latents that the encoder's model samples. `settings` are arguments of `sample_batches`.

    The images have the size that they are sampled at, uncropped.

    Raises:
        UserError: the model is conditioned on images.
    """
    if encoder.model.model.takes_maps:
        raise UserError(
            f"--ckpt: the model is conditioned on {', '.join(encoder.model.concat_keys)} beside captions, and cannot "
            "sample from captions alone; encode images with tools/preencode.py, and name them in data.params.prior_urls"
        )
    size = [side * encoder.model.first_stage_model.downsampling for side in shape[1:]]
    sizes = sizes_of(size, (0, 0, *size), size)

    def samples_of(parts: Sequence[range]) -> Iterator[list[PriorSample]]:
        asked = ([requests[number] for number in part] for part in parts)
        batches = sample_batches(encoder.model, asked, shape, **settings, verbose=False)
        for part, latents in zip(parts, batches, strict=True):
            contexts = encoder.captions([requests[number].prompt for number in part])
            samples = []
            for number, scaled, context in zip(part, latents, contexts, strict=True):
                prompt, origin = requests[number].prompt, {**requests[number].described(), **settings, **sizes}
                latent = (scaled / encoder.model.scale_factor).half().cpu().numpy()
                if not np.isfinite(latent).all():
                    raise UserError(
                        f"{prompt!r}, seed {origin['seed']}: sampled as NaN or infinity; try --precision fp32"
                    )
                key = sample_key(number, prompt)
                samples.append(PriorSample(number, key, latent, dict(context.arrays), prompt, origin))
            yield samples

    return samples_of


def open_images(encoder: SampleEncoder, urls: str, out: str) -> ShardDataset:
    """Return the pre-encoded set at `urls`, and check that the encoder's model encoded it.

    Raises:
        UserError: as `open_shards`; or another model encoded the set, it has several image sizes or a repeated key,
            or `out` would replace it.
    """
    model, encodings = encoder.model, encoder.captions([""])[0].arrays
    if model.model.takes_maps:
        raise UserError(
            f"--shards {urls}: the model is conditioned on {', '.join(model.concat_keys)} beside captions, under which "
            "no teacher is asked; name the shards in data.params.prior_urls as they are"
        )
    dataset = open_shards(urls, extra=(*encodings, ORIGIN, *getattr(model.cond_stage_model, "other_keys", ())))
    replaced = {path.resolve() for path in existing_shards(out)} & {path.resolve() for path in dataset.paths}
    if replaced:
        raise UserError(f"--out {out}: would replace {replaced.pop()}, an input; choose another folder")
    check_encoders(dataset, encoder.digests, "--ckpt")
    settings = common_caption_settings([dataset])
    if settings is not None:
        encoder.follow(settings, f"--shards {urls}: the")
    twice = next((key for key, count in Counter(dataset.sample_keys).items() if count > 1), None)
    if twice is not None:  # the keys of a shard are unique
        raise UserError(
            f"--shards {urls}: two samples have the key {twice!r}; make a prior of each part, and name both in "
            "prior_urls"
        )
    latents, (context, *_) = list(dataset.shapes[LATENT]), dataset.shapes[CONTEXT]
    refuse_if(
        len(latents) > 1,
        f"--shards {urls}: has images of {len(latents)} sizes; give shards with images of one size, that of the "
        "training set",
    )
    model.check_batch_shapes({model.first_stage_key: latents[0], model.cond_stage_key: context})
    return dataset


def latents_of_images(dataset: ShardDataset, channels: int, seed: int) -> Source:
    """Return a source of the samples of `dataset`.

    From a posterior, a latent (`channels`, h, w) is sampled with `seed` and the sample's number.
    """

    def sample_of(number: int) -> PriorSample:
        stored = dataset[number]
        key, latent = stored["__key__"], torch.from_numpy(stored[LATENT])
        encodings = {member: stored[member].astype(STORED) for member in TEXT_ENCODINGS if member in stored}
        described = stored[ORIGIN] if isinstance(stored[ORIGIN], dict) else {}
        if len(latent) != channels:
            generator = torch.Generator().manual_seed(_sample_seed(seed, number))
            latent = DiagonalGaussianDistribution(latent[None].float()).sample(generator)[0]
        origin = {"source": key, "seed": seed, **{name: described[name] for name in SIZES if name in described}}
        return PriorSample(number, key, latent.half().numpy(), encodings, stored[CAPTION], origin)

    return lambda parts: ([sample_of(number) for number in part] for part in parts)


def _sample_seed(seed: int, number: int) -> int:
    """Return the seed for sampling from the posterior of sample `number`."""
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1)[0])  # the teacher uses [seed, number]


def with_teacher(source: Source, teacher: Teacher, dropout: CaptionDropout) -> Source:
    """Return `source` with the predictions of `teacher` on its samples, after caption `dropout`.

    Caption dropout is applied here, because training does not replace the caption of a stored prediction. It
    preserves the unconditional predictions that classifier-free guidance needs.
    """

    size_entries = getattr(teacher.model.cond_stage_model, "other_keys", ())

    def samples_of(parts: Sequence[range]) -> Iterator[list[PriorSample]]:
        for samples in source(parts):
            for sample in samples:
                kept = dropout({**sample.encodings, CAPTION: sample.caption}, 0, sample.number)
                sample.caption = kept.pop(CAPTION)
                sample.encodings = kept
            latents = np.stack([sample.latent for sample in samples])
            each = [sample.conditions(size_entries) for sample in samples]
            conditions = {key: np.stack([values[key] for values in each]) for key in each[0]}
            answers = teacher.answers([sample.number for sample in samples], latents, conditions)
            for sample, answer in zip(samples, answers, strict=True):
                sample.answers = answer
            yield samples

    return samples_of


def digest_of(*content: Any) -> str:
    """Return the SHA-256, in hex, of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def unet_digests(model: LatentDiffusion) -> dict[str, str | None]:
    """Return digests of the UNet's weights and of its EMA weights (None if absent), by name."""
    prefixes = {"unet": MODEL, "unet_ema": EMA}
    return {name: weights_digest(model.state_dict(), prefix) for name, prefix in prefixes.items()}


def digest_shards(dataset: ShardDataset) -> str:
    """Return the SHA-256, in hex, of the sample keys, shard names and shard sizes of `dataset`."""
    return digest_of(list(dataset.sample_keys), [[path.name, path.stat().st_size] for path in dataset.paths])


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
