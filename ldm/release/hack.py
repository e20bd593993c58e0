"""Files of `tools/hack_weights.py`: read, graft, keep the file that is replaced, write, and log it."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.checkpoint import OpenCheckpoint, encoder_digests, open_checkpoint, save_checkpoint, weights_of
from ldm.config.load import build_model
from ldm.locks import locked_file
from ldm.release.graft import graft, grafted_checkpoint
from ldm.release.keys import check_release, check_training_checkpoint
from ldm.util import UserError

log = logging.getLogger(__name__)


def _alone(write: Callable[..., None]) -> Callable[..., None]:
    """Let no two processes run `write` with the same third argument, the file that it writes."""

    @functools.wraps(write)
    def call(first: Any, release: Path, out: Path, *rest: Any, **options: Any) -> None:
        with locked_file(out):
            write(first, release, out, *rest, **options)

    return call


@_alone
def hack_training(training_path: Path, release_path: Path, out: Path) -> None:
    """Write the training checkpoint at `training_path`, with the released weights in it, to `out`.

    Raises:
        UserError: a file is missing, damaged or of another model; nothing is written then.
    """
    if training_path.exists() and release_path.exists() and training_path.samefile(release_path):
        raise UserError(f"{training_path}: given as the release and as the training checkpoint; name two files")
    _check_out(out, release_path)
    training = open_checkpoint(training_path)
    check_training_checkpoint(training.content, training_path)
    release = open_checkpoint(release_path)
    log.info("training checkpoint: %s, at step %s", training_path, training.content["global_step"])
    released = _release_weights(release, release_path)
    grafted = graft(weights_of(training.content, training_path), released, release_path)
    log.info("\n".join(grafted.summary()))
    log.info("the optimizer's state is reset: it belonged to the weights that are replaced")
    content = _with_encoders(grafted_checkpoint(training.content, grafted), released)
    _write(content, out)


@_alone
def hack_config(config: DictConfig, config_names: Sequence[str | Path], release_path: Path, out: Path) -> None:
    """Write a training checkpoint at step 0 for the model of `config`, with the released weights, to `out`.

    `config_names` are the files that `config` was read from.

    Raises:
        UserError: a file is missing, damaged or of another model; nothing is written then.
    """
    _check_out(out, release_path)
    release = open_checkpoint(release_path)
    from ldm.release.fresh import fresh_checkpoint, state_dict_without_weights  # Lightning, seconds to import

    state_dict = state_dict_without_weights(lambda: build_model(config))
    log.info("made from: %s", ", ".join(map(str, config_names)))
    released = _release_weights(release, release_path)
    grafted = graft(state_dict, released, release_path)
    log.info("\n".join(grafted.summary()))
    _write(_with_encoders(fresh_checkpoint(grafted), released), out)


def _release_weights(release: OpenCheckpoint, path: Path) -> dict:
    check_release(release.content, path)
    weights = weights_of(release.content, path)
    log.info("release: %s, %d values", path, len(weights))
    return weights


def _with_encoders(content: dict, released: dict) -> dict:
    """Return `content` with the digests of the release's encoders, which training compares with those of its shards."""
    digests = encoder_digests(released)
    return {**content, "callbacks": {**content.get("callbacks", {}), "SameEncoders": digests}}


def _check_out(out: Path, release: Path) -> None:
    if out.suffix != ".ckpt":
        raise UserError(f"{out}: a training checkpoint's name must end in .ckpt")
    if out.exists() and release.exists() and out.samefile(release):
        raise UserError(f"{out}: is the release itself, which would be replaced; choose another --out")


def _write(content: dict, out: Path) -> None:
    kept = _keep(out) if out.exists() and not _is_made_from_config(out) else None
    try:
        save_checkpoint(content, out)
    except BaseException:  # Ctrl-C too: what was not replaced needs no second name
        if kept and kept.samefile(out):
            kept.unlink()
        raise
    if kept:
        log.info("kept what it replaces: %s", kept)
    log.info("wrote %s (%.2f GB, %d values)", out, out.stat().st_size / 1e9, len(content["state_dict"]))
    log.info("next: python main.py --resume %s --base CONFIG -t --gpus 0,", shlex.quote(str(out)))


def _is_made_from_config(path: Path) -> bool:
    """Return whether `hack_config` wrote the file: then no training is lost with it."""
    try:
        content = open_checkpoint(path).content
    except UserError:
        return False
    return content.get("global_step") == 0 and content.get("optimizer_states") == []


def _keep(path: Path) -> Path:
    """Give the file at `path` a second name that no file has yet; no copy where the file system has links."""
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
    raise AssertionError("endless")
