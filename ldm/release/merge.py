"""Merging of a training checkpoint into the release that it started from. The result is a new release."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.checkpoint import (
    SCHEDULE_KEYS,
    Pending,
    converted,
    ema_key,
    in_memory,
    is_finite,
    open_checkpoint,
    same_values,
)
from ldm.checkpoint.diffusers_folder import stands_in
from ldm.checkpoint.formats import precise_dtype
from ldm.checkpoint.keys import EMA, EMA_COUNTERS, ENCODER, FIRST_STAGE, MODEL, PREDICTION, has_part
from ldm.config.load import load_config
from ldm.locks import run_of
from ldm.release.architecture import OPTIONAL_PARTS, check_same_architecture, is_of_autoencoder
from ldm.release.caption_record import record_of
from ldm.release.destination import About, Destination, save_release
from ldm.release.families import PARAMETERIZATIONS
from ldm.release.keys import check_release, check_training_checkpoint, has_step_counters
from ldm.release.lora_from_training import trained_loras
from ldm.release.lora_merging import Lora, with_loras
from ldm.release.mixture import weighted_sum
from ldm.release.model_spec import title_of, training_settings
from ldm.release.opening import Release, release_of, training_weights, warn_of_other_release, written_dtype
from ldm.release.recognition import check_same_family, find_family, log_family, shapes_of
from ldm.util import UserError, located, refuse_if

log = logging.getLogger(__name__)

Weights = Mapping[str, torch.Tensor]

# Types of the tiers that round weights.
_NARROW = (torch.bfloat16, torch.float16)


@dataclass
class Merge:
    """State dict of a release that holds trained weights, and the origin of each key."""

    kind: str  # kind of the trained weights: "ema" or "raw"
    state_dict: dict[str, torch.Tensor | Pending] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)  # replaced EMA weights of the release
    untouched: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # key prefixes of the training that the release lacks

    def summary(self) -> list[str]:
        """Return one line per kind of key, with its count."""
        kind = "moving average (ema)" if self.kind == "ema" else "raw weights"
        lines = [
            (len(self.trained), f"weights taken from the training, {kind}"),
            (len(self.averaged), "EMA weights of the release replaced"),
            (len(self.untouched), "values of the release kept, unchanged by training"),
        ]
        told = [f"{count} {line}" for count, line in lines if count]
        return told + [f"{part}* of the training skipped: the release lacks it" for part in self.left_out]


def merge(
    training: Weights,
    release: Weights,
    *,
    weights: str | None = None,
    half: bool = False,
    strength: float = 1.0,
) -> Merge:
    """Return `release` with every weight that `training` changed, cast to the release's dtype.

    All other values are identical bit for bit. A weight is changed if it differs from the release's weight in the
    training's dtype, and from that weight as an earlier tier rounds it (see `_starts`). The first comparison is also
    made per element: an unchanged element is not rounded to that dtype.

    Args:
        weights: `ema` takes the moving average, and the raw weight of a key without one. `raw` takes the raw weights.
            None is `ema` if the training has a moving average, else `raw`. The EMA keys of the release get the
            training's moving average, or the raw weights if it has none.
        half: cast floating-point weights to float16. The noise schedule keeps its dtype.
        strength: share of the training's change: 0 is the release, 1 the training.

    Raises:
        UserError: the architectures differ, or `weights` is `ema` and the training has no moving average. Computing a
            `Pending` raises if its value is not finite or too large for the new dtype.
    """
    shadows = {key: ema_key(key) for key in training if key.startswith(MODEL)}
    has_ema = any(shadow in training for shadow in shadows.values())
    refuse_if(
        weights == "ema" and not has_ema,
        "the training checkpoint has no moving average (use_ema: False); use --weights raw",
    )
    left_out = [part for part in OPTIONAL_PARTS if has_part(training, part) and not has_part(release, part)]
    training = {key: value for key, value in training.items() if not key.startswith(tuple(left_out))}
    check_same_architecture(training, release)

    result = Merge(weights or ("ema" if has_ema else "raw"), left_out=left_out)
    origins = {key: key for key in training if key not in SCHEDULE_KEYS and (has_ema or key not in EMA_COUNTERS)}
    if result.kind == "ema":
        origins |= {key: shadow for key, shadow in shadows.items() if shadow in training}
    # EMA keys of the release that the training lacks follow the raw weights.
    followed = {shadow: key for key, shadow in shadows.items() if shadow not in training}

    for key, released in release.items():
        origin = followed.get(key) or origins.get(key)
        reference = followed.get(key, key)
        changed = origin in training and reference in release and _differ(origin, training[origin], release[reference])
        dtype = written_dtype(key, released.dtype, half)
        if changed:
            (result.averaged if key.startswith(EMA) else result.trained).append(key)
            result.state_dict[key] = _converted(
                origin, training[origin], dtype, release[reference], 1.0 if key in EMA_COUNTERS else strength
            )
        else:
            result.untouched.append(key)
            result.state_dict[key] = released if dtype == released.dtype else _converted(key, released, dtype)
    return result


def _differ(key: str, trained: torch.Tensor, released: torch.Tensor) -> bool:
    trained = in_memory(trained)
    starts = _starts(in_memory(released), trained.dtype)
    return not any(same_values(trained, start) for start in starts) and not stands_in(key, trained)


def _starts(released: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the values that an untrained weight of a training in `dtype` can have.

    These are `released` in that dtype, and `released` rounded to a narrower dtype. A training in float32 has the
    latter if it continues one in bfloat16.
    """
    yield converted(released, dtype)
    if dtype in (torch.float32, torch.float64) and released.is_floating_point():
        yield from (converted(converted(released, narrow), dtype) for narrow in _NARROW)


def _converted(
    key: str, tensor: torch.Tensor, dtype: torch.dtype, start: torch.Tensor | None = None, strength: float = 1.0
) -> Pending:
    """Return `tensor` cast to `dtype`, computed when it is written.

    An element that equals `start` in the dtype of `tensor` is taken from `start`. The others move from `start` by the
    share `strength`.
    """

    def compute() -> torch.Tensor:
        value = in_memory(tensor)
        new = converted(value if strength == 1 else _between(in_memory(start), value, strength), dtype)
        if start is not None:
            old = in_memory(start)
            new = torch.where(value == converted(old, value.dtype), converted(old, dtype), new)
        if not is_finite(new):
            if is_finite(value):
                raise UserError(f"{key} has values too large for {dtype}; merge into a release of a wider dtype")
            refuse_if(
                start is not None,
                f"{key} has values that are not finite, because the training diverged; use an older checkpoint",
            )
        return new

    return Pending(tuple(tensor.shape), dtype, compute)


def _between(start: torch.Tensor, value: torch.Tensor, strength: float) -> torch.Tensor:
    """Return (1 − `strength`) · `start` + `strength` · `value`, in at least float32. For integers, return `value`."""
    if not value.is_floating_point():
        return value
    precise = precise_dtype(start.dtype, value.dtype)
    return weighted_sum([converted(start, precise), converted(value, precise)], [strength])


def merge_files(
    training_path: Path,
    release_path: Path,
    out: str | Path | Destination,
    weights: str | None,
    half: bool,
    vae: Path | None = None,
    strength: float = 1.0,
    loras: Sequence[Lora] = (),
    embed_settings: bool = False,
) -> None:
    """Merge `training_path` and `release_path` into the release `out`, and log the origin of its keys.

    `out` is a file, whose suffix chooses the format, or a folder; see `Destination`. Keys are named as in the release,
    and its unused values are copied. The release's metadata is kept as far as it stays true. `weights`, `half` and
    `strength` are as in `merge`. The autoencoder of the file `vae`, if given, replaces that of the release. `loras` are
    added to the result. With `embed_settings`, the metadata tells the settings of the training.

    The training may be that of an autoencoder alone. It replaces that of the release.

    Raises:
        UserError: a file is missing, damaged or of another model. Nothing is written in this case.
    """
    to = out if isinstance(out, Destination) else Destination.of(out)
    with to.locked((training_path, release_path, *(lora.path for lora in loras), *((vae,) if vae else ()))):
        _merge_files(training_path, release_path, to, weights, half, vae, strength, loras, embed_settings)


def _merge_files(
    training_path: Path,
    release_path: Path,
    to: Destination,
    weights: str | None,
    half: bool,
    vae: Path | None,
    strength: float,
    loras: Sequence[Lora],
    embed_settings: bool,
) -> None:
    training, release = open_checkpoint(training_path), open_checkpoint(release_path)
    check_training_checkpoint(training.content, training_path, weights_alone=True)
    check_release(release.content, release_path)
    log.info("training checkpoint: %s, at step %s", training_path, training.content["global_step"])
    has_step_counters(training.content, training_path)
    log.info("release: %s", release_path)
    trained = training_weights(training.content, training_path)
    refuse_if(
        vae and is_of_autoencoder(trained),
        f"--vae {vae}: {training_path} trains an autoencoder itself; leave out one of them",
    )
    opened = release_of(release, release_path, vae, trained)
    check_same_family(opened.shapes, shapes_of(trained), release_path)
    warn_of_other_release(training.content, opened, release_path)
    noted = training.content.get(PREDICTION)
    log_family(opened.shapes, release_path, opened.predicts or noted)
    if vae is not None:
        trained = {key: value for key, value in trained.items() if not key.startswith(FIRST_STAGE)}
    with located(f"{training_path} into {release_path}"):
        own = trained_loras(training.content, training_path, weights, strength)
        merged = merge(trained, opened.weights, weights=None if own else weights, half=half, strength=strength)
        log.info("\n".join(merged.summary()))
        _log_autoencoder(merged.trained, is_of_autoencoder(trained))
        if strength != 1:
            log.info("strength %g: that share of the training's change of each weight", strength)
        state_dict = with_loras(merged.state_dict, [*own, *loras], release_path)
        settings = _settings(training.content, training_path) if embed_settings else {}
        mixed = (title_of(opened.metadata, release_path), *(lora.path.stem for lora in loras)) if loras else ()
        known = noted if noted in PARAMETERIZATIONS else None
        about = About(_prediction(opened, trained, noted), known, mixed, settings, record_of(training.content))
        save_release(opened, state_dict, to, about)


def _log_autoencoder(changed: Sequence[str], is_trained: bool) -> None:
    """Log a warning if an autoencoder among the `changed` keys may be none that the user wants in the release."""
    if is_trained and any(key.startswith(tuple(FIRST_STAGE + name for name in ENCODER)) for key in changed):
        log.warning(
            "the training changed the encoder: UNets and encoded sets of this release do not fit its latents any more; "
            "model.params.freeze_encoder=true trains the decoder alone"
        )
    elif not is_trained and has_part(changed, FIRST_STAGE):
        log.warning("the training's autoencoder differs from the release's and replaces it; --vae FILE takes another")


def _settings(training: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of the training in the checkpoint at `path`, with those of its run's config if it has one."""
    run = run_of(path)
    files = sorted(run.glob("configs/*-project.yaml")) + sorted(run.glob("configs/*-lightning.yaml")) if run else []
    if not files:
        log.info("%s: lies in no run folder, so only its step and its optimizer are embedded", path)
    # Unresolved: a value of the environment stays a reference, which is no setting to embed.
    config = OmegaConf.to_container(load_config(files, trusted=True)) if files else None
    return training_settings(training, config)


def _prediction(release: Release, trained: Weights, noted: Any) -> tuple[str, bool] | None:
    """Return what was trained, the prediction and zero SNR, if the release would be taken for something else.

    `noted` is the parameterization in the training checkpoint; `trained` are its weights.
    """
    family = find_family(release.shapes, parameterization=release.predicts)
    if family is None or noted not in PARAMETERIZATIONS:
        return None
    alphas = trained.get("alphas_cumprod")
    zero_snr = family.zero_snr if alphas is None else noted == "v" and float(in_memory(alphas)[-1]) == 0
    return None if (family.parameterization, family.zero_snr) == (noted, zero_snr) else (noted, zero_snr)
