"""Pictures drawn from the captions of a set at fixed seeds, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Sampling(NamedTuple):
    """How pictures are drawn: `count` a set, whose seeds count up from `seed`; the rest is `text_to_image`'s."""

    count: int
    seed: int = 42
    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"


class Drawn(NamedTuple):
    """What was drawn from a set: the sample's key and request of each picture, and the pictures (n, 3, H, W)."""

    keys: list[str]
    requests: list[Request]
    pictures: Tensor


class SampleDistances(NamedTuple):
    """Distances of `ldm.images.grid.image_distances`, one a sample.

    `moved` is that of base and tuned; the other two are those to the set's own picture, as the base decodes it.
    """

    moved: list[float]
    base_to_picture: list[float]
    tuned_to_picture: list[float]

    def means(self) -> dict[str, Interval]:
        """The mean of each over samples, with its interval."""
        bootstrap = Bootstrap(len(self.moved))
        return {name: bootstrap.mean(np.array(getattr(self, name))) for name in self._fields}


def draw(model: LatentDiffusion, pictures: EvaluationSet, sampling: Sampling, batch_size: int) -> Drawn:
    """Pictures of `sampling.count` captions spread over the set, at the model's own size.

    Raises:
        UserError: the model reads no captions, or settings that the sampler cannot take.
    """
    chosen = [pictures[position] for position in spread(len(pictures), sampling.count)]
    requests = [Request(sample[CAPTION], sampling.seed + index) for index, sample in enumerate(chosen)]
    settings = {"sampler": sampling.sampler, "steps": sampling.steps, "scale": sampling.scale}
    shape = latent_shape(model, None, None)
    drawn = text_to_image(model, requests, shape, batch_size=batch_size, verbose=False, **settings)
    return Drawn([sample["__key__"] for sample in chosen], requests, torch.stack(list(drawn)))


def decoded(model: LatentDiffusion, pictures: EvaluationSet, sampling: Sampling) -> list[Tensor]:
    """The set's own pictures (3, H, W), about [-1, 1], of the captions that `draw` takes."""
    chosen = [pictures[position] for position in spread(len(pictures), sampling.count)]
    return [model.decode_first_stage(clean_latents(model, [sample]))[0].float().cpu() for sample in chosen]


def sample_distances(base: Tensor, tuned: Tensor, own: Sequence[Tensor]) -> SampleDistances:
    """The distances of samples (n, 3, H, W) of both models and the n pictures `own`."""
    pairs = [(base, tuned), (base, own), (tuned, own)]
    return SampleDistances(
        *([float(image_distances(a[None], b[None])) for a, b in zip(*pair, strict=True)] for pair in pairs)
    )
