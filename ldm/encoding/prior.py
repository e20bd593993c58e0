"""Shards of a prior: samples of a released model straight from its latent space, or the latents of a set of pictures.

A sample is as `ldm.encoding.preencode` writes it, but that `<key>.f8.npy` is one latent, float16 (C, h, w), unscaled,
and that a teacher adds its members; see `ldm.encoding.teacher`. `<key>.json` tells how it was drawn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.data.dropout import CaptionDropout
from ldm.encoding.encoder import Encoder
from ldm.encoding.read import sample_key
from ldm.encoding.shard_set import Sample, check_out, finish, locked_set, write_samples
from ldm.encoding.teacher import Teacher
from ldm.models.diffusion.text_to_image import Request, draw_latents
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.shards import npy
from ldm.shards.open import check_encoders, open_shards
from ldm.shards.reader import ShardDataset
from ldm.shards.writer import existing_shards
from ldm.util import UserError


@dataclass
class PriorSample:
    """A sample before it is written; `number` is its place in the set."""

    number: int
    key: str
    latent: np.ndarray  # C h w, float16, unscaled
    context: np.ndarray  # 77 D, float16
    caption: str
    origin: Mapping[str, Any]
    answers: Mapping[str, bytes] = field(default_factory=dict)  # the teacher's members

    def members(self) -> dict[str, bytes]:
        return {
            "f8.npy": npy.encode(self.latent),
            "t5.npy": npy.encode(self.context),
            "txt": self.caption.encode(),
            "json": json.dumps(self.origin).encode(),
            **self.answers,
        }


def _parts(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def drawn(
    encoder: Encoder, requests: Sequence[Request], shape: tuple[int, int, int], settings: Mapping[str, Any], size: int
) -> Iterator[list[PriorSample]]:
    """Samples of the encoder's model, `size` at a time; `settings` are arguments of `draw_latents`."""
    latents = draw_latents(encoder.model, requests, shape, **settings, batch_size=size, verbose=False)
    for part in _parts(len(requests), size):
        contexts = encoder.captions([requests[number].prompt for number in part])
        samples = []
        for number, context in zip(part, contexts, strict=True):
            prompt, origin = requests[number].prompt, {**requests[number]._asdict(), **settings}
            latent = (next(latents) / encoder.model.scale_factor).half().cpu().numpy()
            if not np.isfinite(latent).all():
                raise UserError(f"{prompt!r}, seed {origin['seed']}: drawn as NaN or infinity; try --precision fp32")
            samples.append(PriorSample(number, sample_key(number, prompt), latent, context, prompt, origin))
        yield samples


def open_pictures(encoder: Encoder, urls: str, out: str) -> ShardDataset:
    """The pre-encoded set that `urls` names, which the encoder's model made: what is written says that it did.

    Raises:
        UserError: as `open_shards`; or it was made by another model, is of several sizes, has a key twice, or `out`
            would replace it.
    """
    dataset, model = open_shards(urls), encoder.model
    replaced = {path.resolve() for path in existing_shards(out)} & {path.resolve() for path in dataset.paths}
    if replaced:
        raise UserError(f"--out {out}: would replace {replaced.pop()}, which is read; take another folder")
    check_encoders(dataset, encoder.digests, "--ckpt")
    twice = next((key for key, count in Counter(dataset.sample_keys).items() if count > 1), None)
    if twice is not None:  # one shard cannot hold both
        raise UserError(
            f"--shards {urls}: has two samples {twice!r}; make a prior of each part, and name both in prior_urls"
        )
    latents, (context, *_) = list(dataset.shapes["f8"]), dataset.shapes["t5"]
    if len(latents) > 1:
        raise UserError(f"--shards {urls}: pictures of {len(latents)} sizes; a prior needs one, the training set's")
    model.check_batch_shapes({model.first_stage_key: latents[0], model.cond_stage_key: context})
    return dataset


def pictured(dataset: ShardDataset, channels: int, seed: int, size: int) -> Iterator[list[PriorSample]]:
    """The samples of `dataset`, `size` at a time. Of a posterior a latent (`channels`, h, w) is drawn, by `seed`."""
    for part in _parts(len(dataset), size):
        samples = []
        for number in part:
            stored = dataset[number]
            key, latent, context = stored["__key__"], torch.from_numpy(stored["f8"]), stored["t5"].astype(np.float16)
            if len(latent) != channels:
                generator = torch.Generator().manual_seed(_word(seed, number))
                latent = DiagonalGaussianDistribution(latent[None].float()).sample(generator)[0]
            origin = {"source": key, "seed": seed}
            samples.append(PriorSample(number, key, latent.half().numpy(), context, stored["txt"], origin))
        yield samples


def _word(seed: int, number: int) -> int:
    """The seed of the sample's draw."""
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1)[0])  # without the 1, the teacher's noise


def taught(
    batches: Iterator[list[PriorSample]], teacher: Teacher, dropout: CaptionDropout
) -> Iterator[list[PriorSample]]:
    """`batches` with what `teacher` predicts on them, after `dropout`.

    Training leaves the captions of predictions alone: the empty one is put in here, for what guidance moves away from
    to be remembered as well.
    """
    for samples in batches:
        for sample in samples:
            kept = dropout({"t5": sample.context, "txt": sample.caption}, 0, sample.number)
            sample.context, sample.caption = kept["t5"], kept["txt"]
        latents, contexts = (np.stack([getattr(s, name) for s in samples]) for name in ("latent", "context"))
        answers = teacher.members([sample.number for sample in samples], latents, contexts)
        for sample, answer in zip(samples, answers, strict=True):
            sample.answers = answer
        yield samples


def make_prior(
    encoder: Encoder,
    batches: Iterator[list[PriorSample]],
    count: int,
    out: str,
    *,
    shard_size: int = 1000,
    overwrite: bool = False,
    **about: Any,
) -> list[dict[str, Any]]:
    """Write the `count` samples of `batches` to the shards of `out`, which it returns; `about` goes into the index.

    Raises:
        UserError: shards are there already, or a value does not fit in float16.
    """
    check_out(out, overwrite)
    null = encoder.captions([""])[0]

    def samples() -> Iterator[list[Sample]]:
        with logging_redirect_tqdm(), tqdm(total=count, unit="sample", desc="prior") as bar:
            for batch in batches:
                yield [(sample.key, sample.members()) for sample in batch]
                bar.update(len(batch))

    with locked_set(out):
        shards = write_samples(out, samples(), shard_size)
        about |= {"scale_factor": float(encoder.model.scale_factor), "parameterization": encoder.model.parameterization}
        finish(out, null, shards, samples=count, **encoder.digests, **about)
    return shards
