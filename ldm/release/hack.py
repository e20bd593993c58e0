"""File handling of `tools/hack_weights.py`: read, graft, back up the replaced file, write and log."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.checkpoint import OpenCheckpoint, encoder_digests, open_checkpoint, save_checkpoint, weights_of
from ldm.checkpoint.keys import PREDICTION, RELEASE, is_factor, without_factors
from ldm.checkpoint.markers import check_markers
from ldm.config.load import build_model
from ldm.locks import locked_file
from ldm.release.configs import Chosen, check_prediction
from ldm.release.diffusers_config import check_settings
from ldm.release.graft import graft, grafted_checkpoint
from ldm.release.keys import check_release, check_training_checkpoint, has_step_counters
from ldm.release.opening import Release, check_not_replaced, digest_of, release_of, training_weights
from ldm.release.recognition import check_same_family, log_family, shapes_of, warn_of_new_prediction
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)


def _locked(write: Callable[..., None]) -> Callable[..., None]:
    """Hold the lock on the file `out` during each call of `write`."""

    @functools.wraps(write)
    def call(*arguments: Any, **options: Any) -> None:
        given = inspect.signature(write).bind(*arguments, **options).arguments
        with locked_file(given["out"]):
            write(*arguments, **options)

    return call


@_locked
def hack_training(
    training_path: Path, release_path: Path, out: Path, vae: Path | None = None, parameterization: str | None = None
) -> None:
    """Write the training checkpoint at `training_path`, with the released weights, to `out`.

    The autoencoder of the file `vae`, if given, replaces that of the release. `parameterization`, if given, is what the
    release predicts, whatever its markers tell.

    Raises:
        UserError: a file is missing, damaged or of another model, or the release predicts something else than the
            training. Nothing is written in this case.
    """
    refuse_if(
        training_path.exists() and release_path.exists() and training_path.samefile(release_path),
        f"{training_path}: given both as release and as training checkpoint; name two different files",
    )
    _check_out(out, release_path)
    training = open_checkpoint(training_path)
    check_training_checkpoint(training.content, training_path)
    release = open_checkpoint(release_path)
    log.info("training checkpoint: %s, at step %s", training_path, training.content["global_step"])
    state_dict = training_weights(training.content, training_path)
    if any(map(is_factor, weights_of(training.content, training_path))):
        log.info("LoRA of the training left out: it belongs to the replaced weights, and a new one starts")
    released = _released(release, release_path, vae, state_dict)
    predicts = parameterization or released.predicts
    noted = training.content.get(PREDICTION) or predicts
    check_prediction(noted, predicts, release_path)
    log_family(released.shapes, release_path, noted)
    warn_of_new_prediction(released.shapes, release_path, noted)
    grafted = graft(state_dict, released.weights, release_path)
    log.info("\n".join(grafted.summary()))
    log.info("optimizer state reset: it belongs to the replaced weights")
    if has_step_counters(training.content, training_path):
        content = grafted_checkpoint(training.content, grafted)
    else:
        from ldm.release.initial_checkpoint import checkpoint_at_start  # imports Lightning, which takes seconds

        content = checkpoint_at_start(grafted.state_dict)
    _write(_with_notes(content, released, noted, release_path), out, "CONFIG")


@_locked
def hack_config(chosen: Chosen, release_path: Path, out: Path, vae: Path | None = None) -> None:
    """Write a training checkpoint at step 0 for the model of a config, with the released weights, to `out`.

    `vae` is as in `hack_training`.

    Raises:
        UserError: a file is missing, damaged or of another model. Nothing is written in this case.
    """
    _check_out(out, release_path)
    release = open_checkpoint(release_path)
    from ldm.release.initial_checkpoint import (
        checkpoint_at_start,
        state_dict_without_weights,
    )  # imports Lightning, which takes seconds

    # The release takes the place of the files that the config names.
    state_dict = state_dict_without_weights(lambda: build_model(chosen.config, with_files=False))
    state_dict = without_factors(state_dict)  # a LoRA starts with the training
    log.info("model of the config %s", ", ".join(chosen.names))
    released = _released(release, release_path, vae, state_dict)
    warn_of_new_prediction(released.shapes, release_path, chosen.prediction)
    grafted = graft(state_dict, released.weights, release_path)
    if release.folder is not None:
        check_settings(release.folder, chosen.config)
    log.info("\n".join(grafted.summary()))
    content = _with_notes(checkpoint_at_start(grafted.state_dict), released, chosen.prediction, release_path)
    _write(content, out, chosen.as_typed())


def _released(release: OpenCheckpoint, path: Path, vae: Path | None, own: dict) -> Release:
    check_release(release.content, path)
    opened = release_of(release, path, vae, own)
    log.info("release: %s, %d values", path, len(opened.named.file))
    check_markers(opened.named.carried, str(path))
    check_same_family(opened.shapes, shapes_of(own), path)
    return opened


def _with_notes(content: dict, opened: Release, prediction: str | None, path: Path) -> dict:
    """Return `content` with the digests of the release's encoders and the prediction, which a resumption compares.

    The name and the checksum of the release, a file or a folder at `path`, are added for the report of a run.
    """
    callbacks = {**content.get("callbacks", {}), "SameEncoders": encoder_digests(opened.weights)}
    noted = {} if prediction is None else {PREDICTION: prediction}
    return {**content, "callbacks": callbacks, **noted, RELEASE: {"name": str(path), "sha256": digest_of(opened, path)}}


def _check_out(out: Path, release: Path) -> None:
    refuse_if(out.suffix != ".ckpt", f"{out}: the name of a training checkpoint must end in .ckpt; rename it")
    check_not_replaced(out, [release])


def _write(content: dict, out: Path, base: str) -> None:
    kept = _keep(out) if out.exists() and not _is_made_from_config(out) else None
    try:
        save_checkpoint(content, out)
    except BaseException:  # Ctrl-C too: a file that was not replaced needs no backup
        if kept and kept.samefile(out):
            kept.unlink()
        raise
    if kept:
        log.info("previous file kept as %s", kept)
    log.info("wrote %s (%.2f GB, %d values)", out, out.stat().st_size / 1e9, len(content["state_dict"]))
    log.info("next: python main.py --resume %s --base %s -t --gpus 0,", shlex.quote(str(out)), base)


def _is_made_from_config(path: Path) -> bool:
    """Return True if `hack_config` wrote the file, so that replacing it loses no training."""
    try:
        content = open_checkpoint(path).content
    except UserError:
        return False
    return content.get("global_step") == 0 and content.get("optimizer_states") == []


def _keep(path: Path) -> Path:
    """Back up the file at `path` under an unused name, by a hard link if the file system has them, else by a copy."""
    for count in itertools.count(1):
        number = "" if count == 1 else f"-{count}"
        kept = path.with_name(f"{path.stem}.before-hack{number}{path.suffix}")
        try:
            os.link(path, kept)
        except FileExistsError:
            continue
        except OSError:
            try:
                kept.touch(exist_ok=False)
            except FileExistsError:
                continue
            try:
                shutil.copy2(path, kept)
            except BaseException:
                kept.unlink(missing_ok=True)
                raise
        return kept
    raise AssertionError("unreachable")
