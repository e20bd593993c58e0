"""Sources of the samples of a prior: a released model that samples latents, or a pre-encoded set of images.

A teacher adds its predictions to the samples of a source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ldm.data.dropout import CaptionDropout
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.read import sample_key
from ldm.encoding.teacher import Teacher
from ldm.models.diffusion.text_to_image import Request, sample_batches
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
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
from ldm.shards.writer import existing_shards
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
    """Return the pre-encoded set at `urls`, check that the encoder's model encoded it, and follow its caption settings.

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
        encodings = {member: stored[member].astype(STORED) for member in TEXT_ENCODINGS if member in stored}
        latent, origin = _latent_of(stored, channels, seed, number)
        return PriorSample(number, stored["__key__"], latent, encodings, stored[CAPTION], origin)

    return lambda parts: ([sample_of(number) for number in part] for part in parts)


def prompts_on_images(
    dataset: ShardDataset, channels: int, seed: int, prompts: Sequence[str], encoder: SampleEncoder
) -> Source:
    """Return a source with one sample per prompt. The latent of sample n is that of image n modulo the images.

    Nothing is sampled. A teacher adds what the model predicts for the prompt at this latent.
    """

    def samples_of(parts: Sequence[range]) -> Iterator[list[PriorSample]]:
        for part in parts:
            samples = []
            for number, context in zip(part, encoder.captions([prompts[number] for number in part]), strict=True):
                stored, prompt = dataset[number % len(dataset)], prompts[number]
                latent, origin = _latent_of(stored, channels, seed, number)
                key, encodings = sample_key(number, prompt), dict(context.arrays)
                samples.append(PriorSample(number, key, latent, encodings, prompt, {"prompt": prompt, **origin}))
            yield samples

    return samples_of


def _latent_of(stored: Mapping[str, Any], channels: int, seed: int, number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the latent of a `stored` sample, float16 (C, h, w), and the origin of the sample made of it."""
    latent = torch.from_numpy(stored[LATENT])
    described = stored[ORIGIN] if isinstance(stored[ORIGIN], dict) else {}
    if len(latent) != channels:
        generator = torch.Generator().manual_seed(_sample_seed(seed, number))
        latent = DiagonalGaussianDistribution(latent[None].float()).sample(generator)[0]
    sizes = {name: described[name] for name in SIZES if name in described}
    return latent.half().numpy(), {"source": stored["__key__"], "seed": seed, **sizes}


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
