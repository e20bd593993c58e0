"""Choice of a merge's strength: the lowest that keeps a share of what the training learnt (arXiv:2109.01903)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.config.load import load_config, plain
from ldm.evaluation.front import AtStrength
from ldm.evaluation.releases import Settings
from ldm.files import remove_leftovers_once, temporary_path
from ldm.locks import run_of
from ldm.release.load import load_release, pick_device
from ldm.release.merge import merge_files
from ldm.release.strength_sweep import sweep_strengths
from ldm.shards.urls import without_weights
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

STRENGTHS = tuple(tenths / 10 for tenths in range(2, 11))
SUBJECT, KEPT = "subject", "kept"
_SETTINGS = Settings(limit=16)


def keeping_strength(
    training: Path, release: Path, share: float, weights: str | None = None, vae: Path | None = None
) -> float:
    """Return the lowest of `STRENGTHS` that keeps `share` of what a training learnt, and log all of them.

    What was learnt is 1 − loss / loss of the release, on at most 16 images of the run's `val_urls`, or of its
    `training_urls` if it has none. The run's config names the model and the sets. The merge at strength 1 is written to
    a temporary file, in the folder of checkpoints. It is not mixed with the release for the result, because its dtype
    is that of the release: the result comes from the training, with one rounding.

    Args:
        weights, vae: as in `merge_files`.

    Raises:
        UserError: the checkpoint is not in a run folder, a set cannot be used, or the loss is not below the release's.
    """
    config = _run_config(training)
    sets = _sets(config, training)
    load = partial(load_release, config=config, device=pick_device("auto"), vae=vae)
    remove_leftovers_once(training.parent)
    folder = temporary_path(training.parent / "keep")  # if this process is killed, a later one removes it
    folder.mkdir()
    try:
        tuned = folder / "tuned.safetensors"
        merge_files(training, release, tuned, weights, half=False, vae=vae)
        swept = list(sweep_strengths(release, tuned, load, STRENGTHS, sets, _SETTINGS, vae=vae))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return chosen_strength(swept, share, str(sets[SUBJECT]))


def chosen_strength(swept: Sequence[AtStrength], share: float, where: str) -> float:
    """Return the lowest strength that keeps `share` of what the last, strength 1, learnt. `where` names the set.

    Raises:
        UserError: the loss of the subject is not below the release's.
    """
    losses = {at.strength: {row.name: row.overall for row in at.rows} for at in swept}
    learnt = {strength: 1 - found[SUBJECT].loss_ratio.value for strength, found in losses.items()}
    whole = learnt[swept[-1].strength]
    if whole <= 0:
        raise UserError(
            f"--keep: on {where}, the training's loss is {1 - whole:.3g} times the release's, so that nothing was "
            "learnt; train longer, or give --strength"
        )
    chosen = min(strength for strength, value in learnt.items() if value >= share * whole)
    for strength, value in learnt.items():
        kept = losses[strength].get(KEPT)
        drift = "" if kept is None else f", drift of the prior {kept.drift.value:.3g}"
        sign = " <-" if strength == chosen else ""
        log.info("strength %g: keeps %.3g of the loss reduction%s%s", strength, value / whole, drift, sign)
    return chosen


def _run_config(training: Path) -> DictConfig:
    """Return the config of the run that `training` belongs to."""
    run = run_of(training)
    files = sorted(run.glob("configs/*-project.yaml")) if run else []
    refuse_if(
        not files, f"--keep: {training} lies in no run folder, whose config names the sets to measure; give --strength"
    )
    try:
        return load_config(files)
    except UserError as error:  # such as a class that needs trust
        raise UserError(f"--keep: cannot build the model of the run: {error}; or give --strength") from error


def _sets(config: DictConfig, training: Path) -> dict[str, Any]:
    """Return the shards to measure, by name: of the subject, and of the prior if the run has one."""
    params = plain(config.get("data") or {}).get("params") or {}
    subject = params.get("val_urls") or without_weights(params.get("training_urls"))
    refuse_if(not subject, f"--keep: the config of {training} names no shards in data.params; give --strength")
    prior = params.get("prior_urls")
    return {SUBJECT: subject, **({KEPT: prior} if prior else {})}
