"""A base and a tuned release on the same sets, one model in memory after the other."""

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
from ldm.evaluation.samples import Drawn, SampleDistances, Sampling, decoded, draw, sample_distances
from ldm.evaluation.sets import EvaluationSet, open_set
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.latent import check_reads_captions
from ldm.shards.open import check_encoders
from ldm.util import UserError

logger = logging.getLogger(__name__)


class Settings(NamedTuple):
    """What is evaluated, beside the models and the sets; `limit` is of pictures a set, None for all."""

    timesteps: int = 8
    batch_size: int = 8
    limit: int | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class SetResult:
    """What is known of one set; `base`, `tuned` and `distances` are of the samples, if any were drawn."""

    pictures: EvaluationSet
    timesteps: list[int]
    comparison: Comparison
    base: Drawn | None = None
    tuned: Drawn | None = None
    distances: SampleDistances | None = None


@dataclass(frozen=True)
class _OfBase:
    """What is kept of the base on one set."""

    pictures: EvaluationSet
    timesteps: list[int]
    record: Record
    drawn: Drawn | None
    own: list[Tensor]  # the set's pictures that belong to the samples


def evaluate_releases(
    load: Callable[[Path], LatentDiffusion],
    base: Path,
    tuned: Path,
    sets: Mapping[str, str | Sequence[str]],
    settings: Settings,
    encoders: Mapping[Path, Mapping[str, str | None]] | None = None,
) -> list[SetResult]:
    """What the release `tuned` makes of each of the `sets` (name to shards), beside `base`.

    `encoders` are the digests of each release's, see `encoder_digests`, which must be those that made the sets.

    Raises:
        UserError: a checkpoint or a set cannot be used, a model predicts no finite numbers, or the base nothing at all.
    """
    kept = _look_at_base(load(base), base, sets, settings, encoders or {})  # which no name here keeps
    return _look_at_tuned(load(tuned), tuned, kept, settings)


def _look_at_base(
    model: LatentDiffusion,
    path: Path,
    sets: Mapping[str, str | Sequence[str]],
    settings: Settings,
    encoders: Mapping[Path, Mapping[str, str | None]],
) -> list[_OfBase]:
    sampling = settings.sampling
    if sampling:
        check_reads_captions(model)
    opened = [open_set(name, urls, model, settings.limit) for name, urls in sets.items()]
    for pictures in opened:
        for release, own in encoders.items():
            check_encoders(pictures.dataset, own, str(release))
    timesteps = midpoint_timesteps(model.num_timesteps, settings.timesteps)
    kept = []
    for pictures in opened:
        start = time.monotonic()
        drawn = draw(model, pictures, sampling, settings.batch_size) if sampling else None
        found = record(model, pictures, timesteps, settings.batch_size, f"base, {pictures.name}")
        _check_finite(found.loss, path, pictures, timesteps)
        if not all(eps.any() for eps in found.eps):
            raise UserError(f"{path}: predicts zero, as an untrained model does; name the base with --base")
        kept.append(_OfBase(pictures, timesteps, found, drawn, decoded(model, pictures, sampling) if sampling else []))
        _say(path, pictures, start)
    return kept


def _look_at_tuned(model: LatentDiffusion, path: Path, kept: Sequence[_OfBase], settings: Settings) -> list[SetResult]:
    results = []
    for of_base in kept:
        start, pictures, timesteps = time.monotonic(), of_base.pictures, of_base.timesteps
        found = compare(of_base.record, model, pictures, timesteps, settings.batch_size, f"tuned, {pictures.name}")
        _check_finite(found.tuned, path, pictures, timesteps)
        drawn = distances = None
        if of_base.drawn and settings.sampling:
            drawn = draw(model, pictures, settings.sampling, settings.batch_size)
            distances = sample_distances(of_base.drawn.pictures, drawn.pictures, of_base.own)
        results.append(SetResult(pictures, timesteps, found, of_base.drawn, drawn, distances))
        _say(path, pictures, start)
    return results


def _check_finite(loss: np.ndarray, path: Path, pictures: EvaluationSet, timesteps: Sequence[int]) -> None:
    broken = np.argwhere(~np.isfinite(loss))
    if len(broken):
        position, step = broken[0]
        where = f"{pictures.keys[position]!r} of set {pictures.name!r} at timestep {timesteps[step]}"
        raise UserError(f"{path}: predicts NaN or infinity for {where}; try --precision fp32")


def _say(path: Path, pictures: EvaluationSet, start: float) -> None:
    logger.info("%s: set %s, %d pictures (%.1f s)", path, pictures.name, len(pictures), time.monotonic() - start)
