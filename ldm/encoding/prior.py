"""Shards of a prior: samples of a released model straight from its latent space, or the latents of a set of images.

A sample is as `ldm.encoding.preencode` writes it, except that it holds one latent, float16 (C, h, w), unscaled, and
that a teacher adds its members; see `ldm.encoding.teacher`. Its `json` tells how it was sampled.
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
from ldm.encoding.encoder import Encoder
from ldm.encoding.jobs import Record, plan_shards
from ldm.encoding.making import Job, Making, make_set
from ldm.encoding.read import sample_key
from ldm.encoding.teacher import Teacher
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.text_to_image import Request, draw_batches
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.shards.open import check_encoders, open_shards
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CAPTION, CONTEXT, LATENT, STORED, TEXT_ENCODINGS, encode_members
from ldm.shards.writer import Shard, existing_shards
from ldm.util import UserError


@dataclass
class PriorSample:
    """A sample before it is written; `number` is its place in the set."""

    number: int
    key: str
    latent: np.ndarray  # C h w, float16, unscaled
    encodings: dict[str, np.ndarray]  # of the caption, float16
    caption: str
    origin: Mapping[str, Any]
    answers: Mapping[str, np.ndarray] = field(default_factory=dict)  # the teacher's

    def members(self) -> dict[str, bytes]:
        return encode_members(self.latent, self.encodings, self.caption, self.origin, self.answers)


# Yields the samples of each of the ranges of numbers that it is given.
Source = Callable[[Sequence[range]], Iterator[list[PriorSample]]]


def drawn(
    encoder: Encoder, requests: Sequence[Request], shape: tuple[int, int, int], settings: Mapping[str, Any]
) -> Source:
    """Return a source of samples of the encoder's model; `settings` are arguments of `draw_batches`."""

    def samples_of(parts: Sequence[range]) -> Iterator[list[PriorSample]]:
        asked = ([requests[number] for number in part] for part in parts)
        for part, latents in zip(
            parts, draw_batches(encoder.model, asked, shape, **settings, verbose=False), strict=True
        ):
            contexts = encoder.captions([requests[number].prompt for number in part])
            samples = []
            for number, drawn_latent, context in zip(part, latents, contexts, strict=True):
                prompt, origin = requests[number].prompt, {**requests[number].described(), **settings}
                latent = (drawn_latent / encoder.model.scale_factor).half().cpu().numpy()
                if not np.isfinite(latent).all():
                    raise UserError(
                        f"{prompt!r}, seed {origin['seed']}: sampled as NaN or infinity; try --precision fp32"
                    )
                key = sample_key(number, prompt)
                samples.append(PriorSample(number, key, latent, dict(context.arrays), prompt, origin))
            yield samples

    return samples_of


def open_images(encoder: Encoder, urls: str, out: str) -> ShardDataset:
    """The pre-encoded set that `urls` names, which the encoder's model made: what is written says that it did.

    Raises:
        UserError: as `open_shards`; or it was made by another model, is of several sizes, has a key twice, or `out`
            would replace it.
    """
    dataset, model = open_shards(urls, extra=TEXT_ENCODINGS), encoder.model
    replaced = {path.resolve() for path in existing_shards(out)} & {path.resolve() for path in dataset.paths}
    if replaced:
        raise UserError(f"--out {out}: would replace {replaced.pop()}, which is read; take another folder")
    check_encoders(dataset, encoder.digests, "--ckpt")
    twice = next((key for key, count in Counter(dataset.sample_keys).items() if count > 1), None)
    if twice is not None:  # one shard cannot hold both
        raise UserError(
            f"--shards {urls}: has two samples {twice!r}; make a prior of each part, and name both in prior_urls"
        )
    latents, (context, *_) = list(dataset.shapes[LATENT]), dataset.shapes[CONTEXT]
    if len(latents) > 1:
        raise UserError(f"--shards {urls}: images of {len(latents)} sizes; a prior needs one, the training set's")
    model.check_batch_shapes({model.first_stage_key: latents[0], model.cond_stage_key: context})
    return dataset


def latents_of_images(dataset: ShardDataset, channels: int, seed: int) -> Source:
    """Return a source of the samples of `dataset`. Of a posterior a latent (`channels`, h, w) is sampled, by `seed`."""

    def sample_of(number: int) -> PriorSample:
        stored = dataset[number]
        key, latent = stored["__key__"], torch.from_numpy(stored[LATENT])
        encodings = {member: stored[member].astype(STORED) for member in TEXT_ENCODINGS}
        if len(latent) != channels:
            generator = torch.Generator().manual_seed(_word(seed, number))
            latent = DiagonalGaussianDistribution(latent[None].float()).sample(generator)[0]
        origin = {"source": key, "seed": seed}
        return PriorSample(number, key, latent.half().numpy(), encodings, stored[CAPTION], origin)

    return lambda parts: ([sample_of(number) for number in part] for part in parts)


def _word(seed: int, number: int) -> int:
    """The seed of the sample's draw."""
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1)[0])  # without the 1, the teacher's noise


def taught(source: Source, teacher: Teacher, dropout: CaptionDropout) -> Source:
    """Return `source` with what `teacher` predicts on its samples, after `dropout`.

    Training leaves the captions of predictions alone: the empty one is put in here, for what guidance moves away from
    to be remembered as well.
    """

    def samples_of(parts: Sequence[range]) -> Iterator[list[PriorSample]]:
        for samples in source(parts):
            for sample in samples:
                kept = dropout({**sample.encodings, CAPTION: sample.caption}, 0, sample.number)
                sample.caption = kept.pop(CAPTION)
                sample.encodings = kept
            latents = np.stack([sample.latent for sample in samples])
            encodings = {key: np.stack([s.encodings[key] for s in samples]) for key in samples[0].encodings}
            answers = teacher.answers([sample.number for sample in samples], latents, encodings)
            for sample, answer in zip(samples, answers, strict=True):
                sample.answers = answer
            yield samples

    return samples_of


def digest_of(*content: Any) -> str:
    """Return the SHA-256, in hex, of values that JSON holds."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def unet_digests(model: LatentDiffusion) -> dict[str, str | None]:
    """Return digests of the weights that samples and predictions depend on, beside those of the encoders."""
    prefixes = {"unet": MODEL, "unet_ema": EMA}
    return {name: weights_digest(model.state_dict(), prefix) for name, prefix in prefixes.items()}


def digest_shards(dataset: ShardDataset) -> str:
    """Return the SHA-256, in hex, of the names of samples, and of names and sizes of the shards, of `dataset`."""
    return digest_of(dataset.sample_keys, [[path.name, path.stat().st_size] for path in dataset.paths])


def make_prior(
    encoder: Encoder,
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
    """Write the `count` samples of `source` to the shards of `out`; `about` goes into the index.

    An unfinished set that the same arguments began is taken up, and several processes share the shards, as in
    `ldm.encoding.preencode`.

    Args:
        made_from: what `source` depends on, beside the weights of the encoders. It must be the same to go on with a
            set, and so must `about` and the size of shards.
        batch_size: samples at a time; a batch is of one shard.

    Returns:
        The records of all shards; of a rank above 0, those of its own.

    Raises:
        UserError: shards are there already, or an unfinished set of something else; or a value does not fit in float16.
    """
    model, nulls = encoder.model, encoder.captions([""])[0].arrays
    jobs = plan_shards(out, count, shard_size)

    def write(missing: Sequence[Job], making: Making) -> None:
        parts = [list(_parts(numbers, batch_size)) for _, numbers in missing]
        batches = source([part for ours in parts for part in ours])
        total = sum(len(numbers) for _, numbers in missing)
        with logging_redirect_tqdm(), tqdm(total=total, unit="sample", desc="prior") as bar:
            for (path, _), ours in zip(missing, parts, strict=True):
                making.keep(path, _write_shard(path, islice(batches, len(ours)), making, bar))

    index = {
        **{"samples": count, **encoder.digests, **about},
        **{"scale_factor": float(model.scale_factor), "parameterization": model.parameterization},
    }
    asked = {**made_from, **about, "shard_size": shard_size, "precision": str(encoder.dtype).removeprefix("torch.")}
    return make_set(out, {**asked, **encoder.digests}, jobs, nulls, write, lambda _: index, overwrite, ranks)


def _parts(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _write_shard(path: Path, batches: Iterator[list[PriorSample]], making: Making, bar: tqdm) -> Record:
    """Write the samples of `batches` to the shard at `path`; returns its record."""
    samples = next(batches)
    making.prepare()  # only now it is sure that there will be a set to replace the old one
    with Shard(path) as shard:
        while samples:
            for sample in samples:
                shard.write(sample.key, sample.members())
            bar.update(len(samples))
            samples = next(batches, None)
    return shard.entry
