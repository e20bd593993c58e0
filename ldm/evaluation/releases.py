"""Evaluation of a base and a tuned release on the same sets. Only one model is in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldm.evaluation.denoising import Comparison, Record, compare, record
from ldm.evaluation.protocol import midpoint_timesteps
from ldm.evaluation.samples import (
    SampleDistances,
    Samples,
    Sampling,
    decode_originals,
    sample_captions,
    sample_distances,
)
from ldm.evaluation.sets import EvaluationSet, open_set
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.latent import check_reads_captions
from ldm.modules.encoders.caption_settings import DEFAULT, caption_settings, follow, reads_captions
from ldm.shards.open import check_encoders, common_caption_settings
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)


class Settings(NamedTuple):
    """Settings of an evaluation.

    `limit` is the maximum number of images per set; None takes all. Without `sampling`, no images are sampled.
    """

    timesteps: int = 8
    batch_size: int = 8
    limit: int | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class SetResult:
    """Results on one set.

    `base` and `tuned` are the samples of both models, `distances` their distances. All are None without sampling.
    """

    image_set: EvaluationSet
    timesteps: list[int]
    comparison: Comparison
    base: Samples | None = None
    tuned: Samples | None = None
    distances: SampleDistances | None = None


@dataclass(frozen=True)
class BaseResult:
    """Results of the base model on one set, kept for the comparison."""

    image_set: EvaluationSet
    timesteps: list[int]
    record: Record
    samples: Samples | None
    originals: list[Tensor]  # the set's images of the sampled captions


def evaluate_releases(
    load: Callable[[Path], LatentDiffusion],
    base: Path,
    tuned: Path,
    sets: Mapping[str, str | Sequence[str]],
    settings: Settings,
    encoders: Mapping[Path, Mapping[str, str | None]] | None = None,
) -> list[SetResult]:
    """Compare the release `tuned` with the release `base` on each of the `sets` (name to shards).

    `encoders` gives the digests of the encoders per release, see `encoder_digests`. A set made by other encoders is
    refused.

    Raises:
        UserError: a checkpoint or a set cannot be used, a model predicts NaN or infinity, or the base predicts zero.
    """
    # No variable holds a model here, so that the base is freed before the tuned model is loaded.
    base_results = evaluate_base(load(base), base, sets, settings, encoders or {})
    return evaluate_tuned(load(tuned), tuned, base_results, settings)


def evaluate_base(
    model: LatentDiffusion,
    path: Path,
    sets: Mapping[str, str | Sequence[str]],
    settings: Settings,
    encoders: Mapping[Path, Mapping[str, str | None]],
) -> list[BaseResult]:
    """Evaluate `model`, the base, whose weights are from `path`; the arguments are those of `evaluate_releases`."""
    sampling = settings.sampling
    if sampling:
        check_reads_captions(model)
    opened = [open_set(name, urls, model, settings.limit) for name, urls in sets.items()]
    for image_set in opened:
        for release, digests in encoders.items():
            check_encoders(image_set.dataset, digests, str(release))
    _read_captions_as(opened, model, path)
    timesteps = midpoint_timesteps(model.num_timesteps, settings.timesteps)
    results = []
    for image_set in opened:
        start = time.monotonic()
        samples = sample_captions(model, image_set, sampling, settings.batch_size) if sampling else None
        of_base = record(model, image_set, timesteps, settings.batch_size, f"base, {image_set.name}")
        _check_finite(of_base.loss, path, image_set, timesteps)
        refuse_if(
            not all(eps.any() for eps in of_base.eps),
            f"{path}: predicts zero, as an untrained model does; name the base with --base",
        )
        originals = decode_originals(model, image_set, sampling) if sampling else []
        results.append(BaseResult(image_set, timesteps, of_base, samples, originals))
        _log_set(path, image_set, start)
    return results


def evaluate_tuned(
    model: LatentDiffusion, path: Path, base_results: Sequence[BaseResult], settings: Settings
) -> list[SetResult]:
    """Compare `model`, whose weights are from `path`, with the results of the base."""
    _read_captions_as([base.image_set for base in base_results], model, path)
    results = []
    for base in base_results:
        start, image_set, timesteps = time.monotonic(), base.image_set, base.timesteps
        comparison = compare(base.record, model, image_set, timesteps, settings.batch_size, f"tuned, {image_set.name}")
        _check_finite(comparison.tuned, path, image_set, timesteps)
        samples = distances = None
        if base.samples and settings.sampling:
            samples = sample_captions(model, image_set, settings.sampling, settings.batch_size)
            distances = sample_distances(base.samples.images, samples.images, base.originals)
        results.append(SetResult(image_set, timesteps, comparison, base.samples, samples, distances))
        _log_set(path, image_set, start)
    return results


def _read_captions_as(sets: Sequence[EvaluationSet], model: LatentDiffusion, path: Path) -> None:
    """Read captions with the settings that those of `sets` were encoded with, unless the model has some of its own.

    Raises:
        UserError: the sets differ, or the model cannot have their settings.
    """
    stage, datasets = model.cond_stage_model, [image_set.dataset for image_set in sets]
    if not reads_captions(stage):
        common_caption_settings(datasets)  # of the encodings in the sets
    elif caption_settings(stage) == DEFAULT:
        settings = common_caption_settings(datasets, read=False)
        if settings not in (None, DEFAULT):
            follow(stage, settings, "the sets'")
            logger.info("%s: reads captions with %s, as the sets have them", path, settings)


def _check_finite(loss: np.ndarray, path: Path, image_set: EvaluationSet, timesteps: Sequence[int]) -> None:
    broken = np.argwhere(~np.isfinite(loss))
    if len(broken):
        position, step = broken[0]
        where = f"{image_set.keys[position]!r} of set {image_set.name!r} at timestep {timesteps[step]}"
        raise UserError(f"{path}: predicts NaN or infinity for {where}; try --precision fp32")


def _log_set(path: Path, image_set: EvaluationSet, start: float) -> None:
    logger.info("%s: set %s, %d images (%.1f s)", path, image_set.name, len(image_set), time.monotonic() - start)
