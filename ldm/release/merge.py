"""Merging of a training checkpoint into the release that it started from: a new release."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint import (
    SCHEDULE_KEYS,
    Pending,
    check_suffix,
    converted,
    ema_key,
    in_memory,
    is_finite,
    is_optional,
    open_checkpoint,
    same_values,
    save_state_dict,
)
from ldm.checkpoint.causes import likely_cause
from ldm.checkpoint.keys import EMA, EMA_COUNTERS, FIRST_STAGE, MODEL, TEXT_ENCODERS, has_part
from ldm.checkpoint.names import is_carried
from ldm.locks import locked_file
from ldm.release.keys import check_release, check_training_checkpoint, has_step_counters
from ldm.release.opening import release_of, training_weights
from ldm.util import UserError

log = logging.getLogger(__name__)

Weights = Mapping[str, torch.Tensor]

# Parts that a training may lack: the release's stay as they are.
_OPTIONAL_PARTS = (FIRST_STAGE, *TEXT_ENCODERS)
# Digests of the weights, as other programs store them in the metadata of a release: those of a merge are others.
_STALE_METADATA = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass
class Merge:
    """State dict of a release with trained weights in it, and where each of its keys came from."""

    kind: str  # of the trained weights: "ema" or "raw"
    state_dict: dict[str, torch.Tensor | Pending] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)  # EMA weights of the release, replaced too
    untouched: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # parts of the training that the release lacks

    def summary(self) -> list[str]:
        """Return one line for each kind of key, with counts."""
        kind = "its moving average (ema)" if self.kind == "ema" else "the weights themselves (raw)"
        lines = [
            (len(self.trained), f"weights taken from the training, {kind}"),
            (len(self.averaged), "EMA weights of the release replaced too"),
            (len(self.untouched), "values kept from the release, which training did not change"),
        ]
        told = [f"{count} {what}" for count, what in lines if count]
        return told + [f"{part}* of the training left out: the release has no such part" for part in self.left_out]


def merge(
    training: Weights,
    release: Weights,
    *,
    weights: str | None = None,
    half: bool = False,
) -> Merge:
    """Return `release` with every weight that `training` changed, cast to the release's dtype; the rest bit for bit.

    A weight counts as changed if it differs from the released one in the dtype of the training. The same holds for each
    element: those that a training in a narrow dtype left alone are not rounded.

    Args:
        weights: `ema` takes the moving average where there is one, `raw` the weights themselves; None: `ema` if the
            training has any. EMA keys of the release get the training's EMA, or where it has none the changed weights.
        half: floating weights become float16; the noise schedule keeps its dtype.

    Raises:
        UserError: the two are not of one architecture, or `ema` is asked of a training without. A value that is not
            finite, or too large for its new dtype, raises when its `Pending` is computed.
    """
    shadows = {key: ema_key(key) for key in training if key.startswith(MODEL)}
    has_ema = any(shadow in training for shadow in shadows.values())
    if weights == "ema" and not has_ema:
        raise UserError("the training checkpoint has no moving average (use_ema: False); use --weights raw")
    left_out = [part for part in _OPTIONAL_PARTS if has_part(training, part) and not has_part(release, part)]
    training = {key: value for key, value in training.items() if not key.startswith(tuple(left_out))}
    check_same_architecture(training, release)

    result = Merge(weights or ("ema" if has_ema else "raw"), left_out=left_out)
    origins = {key: key for key in training if key not in SCHEDULE_KEYS and (has_ema or key not in EMA_COUNTERS)}
    if result.kind == "ema":
        origins |= {key: shadow for key, shadow in shadows.items() if shadow in training}
    # The EMA that a release carries must not stay that of weights which are gone.
    followed = {shadow: key for key, shadow in shadows.items() if shadow not in training}

    for key, released in release.items():
        origin = followed.get(key) or origins.get(key)
        reference = followed.get(key, key)
        changed = origin in training and reference in release and _differ(training[origin], release[reference])
        dtype = torch.float16 if half and released.is_floating_point() and key not in SCHEDULE_KEYS else released.dtype
        if changed:
            (result.averaged if key.startswith(EMA) else result.trained).append(key)
            result.state_dict[key] = _converted(origin, training[origin], dtype, start=release[reference])
        else:
            result.untouched.append(key)
            result.state_dict[key] = released if dtype == released.dtype else _converted(key, released, dtype)
    return result


def check_same_architecture(training: Weights, release: Weights) -> None:
    """Raise `UserError` unless the weights of both have the same keys and shapes.

    The release may have a first stage and text encoders that the training lacks; both may have or lack optional keys.
    """
    cause = "are they of one model?"
    for key, value in training.items():
        if key in release and key not in SCHEDULE_KEYS and value.shape != release[key].shape:
            shapes = f"{tuple(value.shape)} in the training, {tuple(release[key].shape)} in the release"
            raise UserError(f"{key} has shape {shapes}; {likely_cause(release, training, cause)}")
        if key not in release and not (is_optional(key) or is_carried(key)):
            raise UserError(
                f"the release lacks {key}, which the training has; {likely_cause(release, training, cause)}"
            )
    parts = [part for part in _OPTIONAL_PARTS if not has_part(training, part)]
    for key in release:
        if key not in training and not is_optional(key) and not key.startswith(tuple(parts)):
            raise UserError(
                f"the training lacks {key}, which the release has; {likely_cause(release, training, cause)}"
            )


def _differ(trained: torch.Tensor, released: torch.Tensor) -> bool:
    trained = in_memory(trained)
    return not same_values(trained, converted(in_memory(released), trained.dtype))


def _converted(key: str, tensor: torch.Tensor, dtype: torch.dtype, start: torch.Tensor | None = None) -> Pending:
    """Return `tensor` in `dtype`, to be computed when it is written.

    Elements of a trained `tensor` that still equal `start` in its dtype are those of `start`.
    """

    def compute() -> torch.Tensor:
        value = in_memory(tensor)
        new = converted(value, dtype)
        if start is not None:
            old = in_memory(start)
            new = torch.where(value == converted(old, value.dtype), converted(old, dtype), new)
        if not is_finite(new):
            if is_finite(value):
                raise UserError(f"{key} has values too large for {dtype}; merge into a release of a wider dtype")
            if start is not None:
                raise UserError(
                    f"{key} has values that are not finite: the training diverged; take an older checkpoint"
                )
        return new

    return Pending(tuple(tensor.shape), dtype, compute)


def merge_files(
    training_path: Path, release_path: Path, out: Path, weights: str | None, half: bool, vae: Path | None = None
) -> None:
    """Merge the checkpoints at `training_path` and `release_path` into the release `out`; log where its keys come from.

    `weights` and `half` are those of `merge`; the format of `out` goes by its suffix. The keys have the names that the
    release has for them, and values that no model uses are written as they are. The release's metadata is kept, except
    for digests of its weights. `vae` is a file whose autoencoder takes the place of the release's.

    Raises:
        UserError: a file is missing, damaged or of another model; nothing is written then.
    """
    check_suffix(out)
    with locked_file(out):
        _merge_files(training_path, release_path, out, weights, half, vae)


def _merge_files(
    training_path: Path, release_path: Path, out: Path, weights: str | None, half: bool, vae: Path | None
) -> None:
    for path in (training_path, release_path):
        if out.exists() and path.exists() and out.samefile(path):
            raise UserError(f"{out}: is one of the files to merge, which would be replaced; choose another --out")
    training, release = open_checkpoint(training_path), open_checkpoint(release_path)
    check_training_checkpoint(training.content, training_path)
    check_release(release.content, release_path)
    log.info("training checkpoint: %s, at step %s", training_path, training.content["global_step"])
    has_step_counters(training.content, training_path)
    log.info("release: %s", release_path)
    trained = training_weights(training.content, training_path)
    opened = release_of(release, release_path, vae, trained)
    if vae is not None:
        trained = {key: value for key, value in trained.items() if not key.startswith(FIRST_STAGE)}
    try:
        merged = merge(trained, opened.weights, weights=weights, half=half)
        log.info("\n".join(merged.summary()))
        metadata = {key: text for key, text in release.metadata.items() if key not in _STALE_METADATA}
        content = opened.named.restored(merged.state_dict)
        save_state_dict(content, out, metadata=metadata)
    except UserError as error:
        raise UserError(f"{training_path} into {release_path}: {error}") from error
    log.info("wrote %s (%.2f GB, %d values)", out, out.stat().st_size / 1e9, len(content))
