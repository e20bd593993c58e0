"""Callbacks of a run: the defaults, `lightning.callbacks` and `lightning.modelcheckpoint`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import LearningRateMonitor

from ldm.callbacks.accumulation import MeanOfBatches
from ldm.callbacks.checkpoints import LastCheckpoint
from ldm.callbacks.encoders import SameEncoders
from ldm.callbacks.forgetting import Forgetting
from ldm.callbacks.progress import ProgressBar
from ldm.callbacks.resume import LearningRateOnResume, NoStepsLeft
from ldm.callbacks.rng import StepSeeds
from ldm.callbacks.run_events import RunEvents
from ldm.callbacks.setup import SetupCallback
from ldm.callbacks.signals import SignalRequests
from ldm.callbacks.summary import ParameterSummary
from ldm.callbacks.validation import SparseValidation, ValidationAcrossEpochs
from ldm.config.load import plain
from ldm.training.described import check_callback_places, instantiate_described
from ldm.training.loggers import logs_anything
from ldm.training.preview_setup import build_previews
from ldm.training.run import Run
from ldm.util import UserError, nearest

log = logging.getLogger(__name__)

_DEFAULT_CALLBACKS: dict[str, Any] = {
    "image_logger": {"target": "ldm.callbacks.image_logger.ImageLogger", "params": {"batch_frequency": 750}},
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "cuda_callback": {"target": "ldm.callbacks.device.CUDACallback"},
    "numerical_faults": {"target": "ldm.callbacks.faults.NumericalFaults"},
    "timestep_losses": {"target": "ldm.callbacks.timestep_losses.TimestepLosses"},
    "held_out_gap": {"target": "ldm.callbacks.held_out_gap.HeldOutGap"},
}
# Callback that public configs change without a target. It keeps the weights at intervals.
_TRAINSTEPS = "metrics_over_trainsteps_checkpoint"
_TRAINSTEPS_PARAMS = {
    "filename": "{epoch:06}-{step:09}",
    "verbose": True,
    "save_top_k": -1,
    "every_n_train_steps": 10000,
    "save_weights_only": True,
}
# Parameters of modelcheckpoint that apply to last.ckpt, and those that do not apply to the kept checkpoints.
_LAST_PARAMS = ("every_n_train_steps", "train_time_interval", "save_last_k", "in_background")
_NOT_FOR_KEPT = ("save_last", "dirpath", "train_time_interval", "save_last_k", "in_background")


def build_callbacks(config: DictConfig, run: Run, requests: SignalRequests, seed: int) -> list[Callback]:
    """Return the default callbacks, with the changes and additions of `lightning.callbacks`.

    Raises:
        UserError: a callback cannot be built, or would write outside the run folder.
    """
    section = config.lightning
    callbacks: list[Callback] = [
        StepSeeds(seed),
        LearningRateOnResume(),
        NoStepsLeft(),
        SameEncoders(run.resume is not None or _names_weights(config)),
        SetupCallback(
            now=run.started,
            logdir=run.folder,
            ckptdir=run.checkpoints,
            cfgdir=run.configs,
            config=OmegaConf.masked_copy(config, ["model", "data"]),
            lightning_config=section,
        ),
        RunEvents(run.events, run.resume, seed),
    ]
    refresh_rate = section.trainer.get("progress_bar_refresh_rate", 1)
    if section.trainer.get("enable_progress_bar") is not False and refresh_rate != 0:
        callbacks.append(ProgressBar(refresh_rate or 1))
    if section.trainer.get("enable_model_summary") is not False and "weights_summary" not in section.trainer:
        callbacks.append(ParameterSummary())
    entries = _described_callbacks(plain(section.get("callbacks") or {}), run)
    for where, entry in entries.items():
        check_callback_places(entry, run.folder, where)
    built = [instantiate_described(entry, where) for where, entry in entries.items()]
    if not logs_anything(config):
        built = [callback for callback in built if not isinstance(callback, LearningRateMonitor)]
    if type(section.trainer.get("val_check_interval")) is int and "check_val_every_n_epoch" not in section.trainer:
        callbacks.append(ValidationAcrossEpochs())
    batch_size = ((config.data.get("params") or {}).get("batch_size")) if section.scale_lr else None
    built += build_previews(config)
    return [*callbacks, *built, *_build_checkpoints(config, run, requests, built), MeanOfBatches(batch_size)]


def _described_callbacks(given: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the default callbacks changed by those `given`, by their place in the config; null is for none.

    Raises:
        UserError: what stands for a callback is no mapping.
    """
    defaults = dict(_DEFAULT_CALLBACKS)
    if _TRAINSTEPS in given:
        params = {"dirpath": str(run.checkpoints / "trainstep_checkpoints"), **_TRAINSTEPS_PARAMS}
        defaults[_TRAINSTEPS] = {"target": "ldm.callbacks.kept.KeptCheckpoints", "params": params}
    entries = {}
    for name in dict.fromkeys((*defaults, *given)):
        where, default = f"lightning.callbacks.{name}", defaults.get(name, {})
        entry = given.get(name, default)
        if entry is None:
            continue
        if not isinstance(entry, dict):
            raise UserError(f"{where} {entry!r:.100}: give a mapping with target and params, or null for no callback")
        said = {key: value for key, value in entry.items() if value is not None}
        entries[where] = plain(OmegaConf.merge(default, said))
    return entries


def _names_weights(config: DictConfig) -> bool:
    """Return True if the config loads the autoencoder's weights from a file."""
    named = ("model.params.ckpt_path", "model.params.first_stage_config.params.ckpt_path")
    return any(OmegaConf.select(config, key) is not None for key in named)


def _build_checkpoints(
    config: DictConfig, run: Run, requests: SignalRequests, others: Sequence[Callback]
) -> list[Callback]:
    section = config.lightning
    periodic = section.trainer.get("enable_checkpointing", section.trainer.get("checkpoint_callback")) is not False
    described = plain(section.get("modelcheckpoint") or {})
    for key in described:
        if key not in ("target", "params"):
            raise UserError(f"unknown key lightning.modelcheckpoint.{key}{nearest(key, ['target', 'params'])}")
    given = described.get("params") or {}
    given = {key: value for key, value in given.items() if value is not None or key == "monitor"}
    last_params = {key: given[key] for key in _LAST_PARAMS if key in given}
    last = LastCheckpoint(run.checkpoints / "last.ckpt", requests, **last_params, periodic=periodic)
    if given.get("save_last") not in (None, True, False, "link"):
        raise UserError(f"lightning.modelcheckpoint.params.save_last {given['save_last']!r:.100}: give true")
    if given.get("save_last") is False:
        log.warning("lightning.modelcheckpoint.params.save_last is ignored: runs resume from last.ckpt")
    if given.get("dirpath") is not None:
        log.warning("lightning.modelcheckpoint.params.dirpath is ignored: checkpoints are in %s", run.checkpoints)
    params = {key: value for key, value in given.items() if key not in _NOT_FOR_KEPT}
    params.setdefault("monitor", (config.model.get("params") or {}).get("monitor"))
    if params["monitor"] is not None:
        params.setdefault("save_top_k", 3)
        # Not the interval of last.ckpt: the metric changes only at a validation, or when a callback logs it.
        params["every_n_train_steps"] = _logging_interval(params["monitor"], others)
    elif "train_time_interval" in last_params and "every_n_train_steps" not in last_params:
        params["train_time_interval"] = timedelta(minutes=last_params["train_time_interval"])
    if not periodic or (params["monitor"] is None and "save_top_k" not in params):
        return [last]
    params = {"dirpath": str(run.checkpoints), "filename": "{epoch:06}-{step:09}", "verbose": True, **params}
    kept = {"target": "ldm.callbacks.kept.KeptCheckpoints", "params": params}
    check_callback_places(kept, run.folder, "lightning.modelcheckpoint")
    best = instantiate_described(kept, "lightning.modelcheckpoint")
    best.writing = last.writing
    callbacks = [best, last]
    intervals = [section.trainer.get(key) for key in ("val_check_interval", "check_val_every_n_epoch")]
    if last.every_n_train_steps and not any(n is not None for n in (*intervals, given.get("every_n_epochs"))):
        callbacks.append(SparseValidation(last.every_n_train_steps))
    return callbacks


def _logging_interval(metric: str, callbacks: Sequence[Callback]) -> int | None:
    """Return the number of steps after which one of `callbacks` logs `metric`; None if none does."""
    evaluating = (callback for callback in callbacks if isinstance(callback, Forgetting))
    return next((callback.every_n_train_steps for callback in evaluating if metric in callback.metrics), None)
