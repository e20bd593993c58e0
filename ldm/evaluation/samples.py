"""Images sampled from the captions of a set at fixed seeds, and their distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.denoising import clean_latents
from ldm.evaluation.protocol import spread
from ldm.evaluation.sets import EvaluationSet
from ldm.evaluation.statistics import Bootstrap, Interval
from ldm.images.grid import image_distances
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
from ldm.shards.sample import CAPTION
from ldm.util import UserError


class Sampling(NamedTuple):
    """Settings for sampling `count` images per set, with the seeds `seed`, `seed` + 1, ….

    The other settings are those of `text_to_image`.
    """

    count: int
    seed: int = 42
    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"


class Samples(NamedTuple):
    """Sampled images (n, 3, H, W) of one set, with the key of the set's sample and the request of each image."""

    keys: list[str]
    requests: list[Request]
    images: Tensor


class SampleDistances(NamedTuple):
    """Distances of `ldm.images.grid.image_distances`, one per sampled caption.

    "image" is the distance to the set's image of that caption, as the base's autoencoder decodes it.
    """

    base_to_tuned: list[float]
    base_to_image: list[float]
    tuned_to_image: list[float]

    def means(self) -> dict[str, Interval]:
        """Return the mean of each distance over the samples, with its confidence interval."""
        bootstrap = Bootstrap(len(self.base_to_tuned))
        return {name: bootstrap.mean(np.array(getattr(self, name))) for name in self._fields}


def sample_captions(model: LatentDiffusion, image_set: EvaluationSet, sampling: Sampling, batch_size: int) -> Samples:
    """Sample images of `sampling.count` captions spread over the set, at the model's own size.

    Raises:
        UserError: the model reads no captions or takes images beside them, or the sampler refuses the settings.
    """
    if model.model.takes_maps:
        raise UserError(
            f"conditioning_key {model.model.conditioning_key!r}: this model samples from images too; set --sample 0"
        )
    chosen = _chosen(image_set, sampling)
    requests = [Request(sample[CAPTION], sampling.seed + index) for index, sample in enumerate(chosen)]
    settings = {"sampler": sampling.sampler, "steps": sampling.steps, "scale": sampling.scale}
    shape = latent_shape(model, None, None)
    images = text_to_image(model, requests, shape, batch_size=batch_size, verbose=False, **settings)
    return Samples([sample["__key__"] for sample in chosen], requests, torch.stack(list(images)))


def decode_originals(model: LatentDiffusion, image_set: EvaluationSet, sampling: Sampling) -> list[Tensor]:
    """Decode the set's images (3, H, W), about [-1, 1], of the captions that `sample_captions` samples."""
    chosen = _chosen(image_set, sampling)
    return [model.decode_first_stage(clean_latents(model, [sample]))[0].float().cpu() for sample in chosen]


def _chosen(image_set: EvaluationSet, sampling: Sampling) -> list[dict[str, Any]]:
    return [image_set[position] for position in spread(len(image_set), sampling.count)]


def sample_distances(base: Tensor, tuned: Tensor, originals: Sequence[Tensor]) -> SampleDistances:
    """Return the distances between the samples (n, 3, H, W) of both models and the n images `originals`."""
    pairs = [(base, tuned), (base, originals), (tuned, originals)]
    return SampleDistances(
        *([float(image_distances(a[None], b[None])) for a, b in zip(*pair, strict=True)] for pair in pairs)
    )
