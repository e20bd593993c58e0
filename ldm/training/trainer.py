"""What the section `lightning` describes: callbacks, loggers and the Trainer; and the learning rate."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.callbacks.checkpoints import LastCheckpoint
from ldm.callbacks.encoders import SameEncoders
from ldm.callbacks.forgetting import Forgetting
from ldm.callbacks.progress import ProgressBar
from ldm.callbacks.resume import LearningRateOnResume, NothingLeft
from ldm.callbacks.rng import StepSeeds
from ldm.callbacks.setup import SetupCallback
from ldm.callbacks.signals import SignalRequests
from ldm.callbacks.summary import ParameterSummary
from ldm.callbacks.validation import SparseValidation
from ldm.config.load import load_config, plain
from ldm.distributed.ranks import launched
from ldm.training.arguments import Arguments
from ldm.training.precision import Bfloat16Weights
from ldm.training.quiet import silence_lightning
from ldm.training.resume import AtomicCheckpointIO, TrainingCheckpoint
from ldm.training.run import Run
from ldm.training.strategies import ShardedStrategy, check_launch, host_state_strategy, strategy, streams_weights
from ldm.training.trainer_2022 import check_names, is_single, modernise, take_old_keys
from ldm.util import UserError, instantiate_from_config, nearest

log = logging.getLogger(__name__)

_LIGHTNING_KEYS = (
    "trainer",
    "callbacks",
    "logger",
    "modelcheckpoint",
    "strategy",
    "find_unused_parameters",
    "metrics_over_trainsteps_checkpoint",
    "scale_lr",  # the switch, which a run remembers here
)
_DEFAULT_CALLBACKS: dict[str, Any] = {
    "image_logger": {"target": "ldm.callbacks.image_logger.ImageLogger", "params": {"batch_frequency": 750}},
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "cuda_callback": {"target": "ldm.callbacks.device.CUDACallback"},
    "numerical_faults": {"target": "ldm.callbacks.faults.NumericalFaults"},
}
_DEFAULT_LOGGER = "pytorch_lightning.loggers.TensorBoardLogger"
# Classes of 2022 that Lightning no longer has.
_MOVED = {
    "pytorch_lightning.loggers.TestTubeLogger": "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.plugins.DDPPlugin": "pytorch_lightning.strategies.DDPStrategy",
}
# Where the data modules are that give each process its share themselves.
_SHARING_DATA = ("main.", "ldm.data.")
# Parameters of modelcheckpoint that are last.ckpt's too or alone, and those that it decides for itself.
_OF_LAST = ("every_n_train_steps", "train_time_interval", "save_last_k")
_NOT_KEPT = ("save_last", "dirpath", "train_time_interval", "save_last_k")


def merge_config(arguments: Arguments, run: Run) -> DictConfig:
    """The config of a run: what it saved before, then `--base` left to right, then the command line.

    Raises:
        UserError: a config cannot be read, or names what needs trust; a key of the section `lightning`, or a Trainer
            argument, does not exist.
    """
    valid = set(inspect.signature(Trainer).parameters)
    check_names(arguments.trainer, valid, "option --{}")
    config = load_config([*run.saved_configs, *arguments.base], arguments.overrides, arguments.trust_config)
    section = config.setdefault("lightning", {})
    for key in section:
        if key not in _LIGHTNING_KEYS:
            raise UserError(f"unknown key lightning.{key}{nearest(str(key), list(_LIGHTNING_KEYS))}")
    take_old_keys(section)
    if arguments.scale_lr is not None:
        section["scale_lr"] = arguments.scale_lr
    if not isinstance(section.setdefault("scale_lr", True), bool):
        raise UserError(f"lightning.scale_lr {section['scale_lr']!r}: give true or false")
    section["trainer"] = OmegaConf.merge(section.get("trainer") or {}, arguments.trainer)
    check_names(section["trainer"], valid, "key lightning.trainer.{}")
    return config


def build_callbacks(config: DictConfig, run: Run, requests: SignalRequests, seed: int) -> list[Callback]:
    """The default callbacks, changed and added to by `lightning.callbacks`."""
    section = config.lightning
    callbacks: list[Callback] = [
        StepSeeds(seed),
        LearningRateOnResume(),
        NothingLeft(),
        SameEncoders(run.resume is not None or _names_weights(config)),
        SetupCallback(
            now=run.started,
            logdir=run.folder,
            ckptdir=run.checkpoints,
            cfgdir=run.configs,
            config=OmegaConf.masked_copy(config, ["model", "data"]),
            lightning_config=section,
        ),
    ]
    refresh_rate = section.trainer.get("progress_bar_refresh_rate", 1)
    if section.trainer.get("enable_progress_bar") is not False and refresh_rate != 0:
        callbacks.append(ProgressBar(refresh_rate or 1))
    if section.trainer.get("enable_model_summary") is not False and "weights_summary" not in section.trainer:
        callbacks.append(ParameterSummary())
    described = OmegaConf.merge(_DEFAULT_CALLBACKS, section.get("callbacks") or {})
    built = [_instantiate(plain(entry), f"lightning.callbacks.{name}") for name, entry in described.items()]
    if section.trainer.get("logger") is False:
        built = [callback for callback in built if not isinstance(callback, LearningRateMonitor)]
    return callbacks + built + _build_checkpoints(config, run, requests, built)


def _names_weights(config: DictConfig) -> bool:
    """Whether the config takes the autoencoder's weights from a file."""
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
    of_last = {key: given[key] for key in _OF_LAST if given.get(key) is not None}
    last = LastCheckpoint(run.checkpoints / "last.ckpt", requests, **of_last, periodic=periodic)
    params = {key: value for key, value in given.items() if key not in _NOT_KEPT}
    params.setdefault("monitor", (config.model.get("params") or {}).get("monitor"))
    if params["monitor"] is not None:
        params.setdefault("save_top_k", 3)
        # Not last.ckpt's number of steps: the metric is new only after a validation, or where a callback logs it.
        params["every_n_train_steps"] = _steps_between(params["monitor"], others)
    elif "train_time_interval" in of_last and "every_n_train_steps" not in of_last:
        params["train_time_interval"] = timedelta(minutes=of_last["train_time_interval"])
    if not periodic or (params["monitor"] is None and "save_top_k" not in params):
        return [last]
    params = {"dirpath": str(run.checkpoints), "filename": "{epoch:06}-{step:09}", "verbose": True, **params}
    kept = {"target": "ldm.callbacks.checkpoints.KeptCheckpoints", "params": params}
    best = _instantiate(kept, "lightning.modelcheckpoint")
    best.writing = last.writing
    callbacks = [best, last]
    intervals = [section.trainer.get(key) for key in ("val_check_interval", "check_val_every_n_epoch")]
    if last.every_n_train_steps and not any(n is not None for n in (*intervals, given.get("every_n_epochs"))):
        callbacks.append(SparseValidation(last.every_n_train_steps))
    return callbacks


def _steps_between(metric: str, callbacks: Sequence[Callback]) -> int | None:
    """Every how many steps one of `callbacks` logs `metric`; None if none does."""
    evaluating = (callback for callback in callbacks if isinstance(callback, Forgetting))
    return next((callback.every_n_train_steps for callback in evaluating if metric in callback.metrics), None)


def build_loggers(config: DictConfig, run: Run, project: str | None) -> list[Logger] | bool:
    """A CSV logger, and TensorBoard or what `lightning.logger` describes."""
    if config.lightning.trainer.get("logger") is False:
        return False
    described = {"target": _DEFAULT_LOGGER, **plain(config.lightning.get("logger") or {})}
    params = {"save_dir": str(run.folder), **(described.get("params") or {})}
    target = _MOVED.get(described["target"], described["target"])
    if target.endswith("TensorBoardLogger"):
        params = {"name": "tensorboard", "version": "", **params}
    elif target.endswith("WandbLogger"):
        params = {"name": run.folder.name, **params}
        if project:
            params["project"] = project
    try:
        logger = _instantiate({**described, "params": params}, "lightning.logger")
    except ModuleNotFoundError as error:
        raise UserError(f"lightning.logger: {target} needs a package that is not installed ({error})") from error
    return [logger, CSVLogger(str(run.folder), name="csv")]


def build_trainer(
    config: DictConfig,
    callbacks: list[Callback],
    loggers: list[Logger] | bool,
    run: Run,
    checkpoint: TrainingCheckpoint | None,
) -> Trainer:
    """The Trainer that `config.lightning` describes, which goes on from `checkpoint` if there is one.

    Raises:
        UserError: an argument has a value that Lightning does not take, or that does not go with the model.
    """
    has_cuda = torch.cuda.is_available()
    given, launch = plain(config.lightning.trainer), launched()
    if launch:
        given.setdefault("num_nodes", launch.machines)
    given = modernise(given, has_cuda=has_cuda, launched=launch.processes if launch else 1)
    if launch:
        check_launch(given, launch)
    if streams_weights(config):
        given["strategy"] = host_state_strategy(given, has_cuda)
    elif not is_single(given):
        given.setdefault("strategy", _described_strategy(config.lightning))
    given["strategy"] = strategy(given)
    if isinstance(given["strategy"], ShardedStrategy):
        given["inference_mode"] = False  # weights gathered in a validation must be fit for the training after it
    if config.data.target.startswith(_SHARING_DATA):
        given["use_distributed_sampler"] = False
    given |= {
        "callbacks": callbacks,
        "default_root_dir": str(run.folder),
        "enable_checkpointing": True,  # LastCheckpoint decides when
        "logger": loggers,
        "plugins": [AtomicCheckpointIO(checkpoint)],
    }
    if given.get("precision") == "bf16-true":
        del given["precision"]  # Lightning takes the name or the plugin
        given["plugins"].append(Bfloat16Weights())
    silence_lightning()
    try:
        return Trainer(**given)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:  # the last of Slurm
        values = ", ".join(f"{key}={value!r}" for key, value in plain(config.lightning.trainer).items())
        raise UserError(f"lightning.trainer: {' '.join(str(error).split())} (given: {values})") from error


def set_learning_rate(model: LightningModule, config: DictConfig, trainer: Trainer) -> None:
    """Set `model.learning_rate` from `model.base_learning_rate`, times the images of a step if `lightning.scale_lr`.

    Raises:
        UserError: there is no base learning rate, or no batch size to scale it by.
    """
    base = config.model.get("base_learning_rate")
    if not isinstance(base, (int, float)) or not 0 <= base < math.inf:
        raise UserError(f"model.base_learning_rate is {base}; give a number, as in model.base_learning_rate=1e-5")
    if not config.lightning.scale_lr:
        model.learning_rate = base
        log.info("Learning rate %.3e (not scaled)", base)
        return
    batch_size = ((config.get("data") or {}).get("params") or {}).get("batch_size")
    if batch_size is None:
        raise UserError("no data.params.batch_size to scale the learning rate by; give it, or --scale_lr False")
    accumulate, devices = trainer.accumulate_grad_batches, trainer.world_size
    model.learning_rate = accumulate * devices * batch_size * base
    log.info(
        "Learning rate %.3e = %d (accumulated batches) * %d (devices) * %d (batch size) * %.3e (base_learning_rate)",
        model.learning_rate, accumulate, devices, batch_size, base,
    )  # fmt: skip


def _described_strategy(section: DictConfig) -> Any:
    described = section.get("strategy")
    if isinstance(described, str):
        return described
    if described:
        return _instantiate(plain(described), "lightning.strategy")
    return "ddp_find_unused_parameters_true" if section.get("find_unused_parameters") else "auto"


def _instantiate(described: Mapping[str, Any], where: str) -> Any:
    """`instantiate_from_config` that knows what moved, and names the place in the config in its errors."""
    target = described.get("target")
    try:
        return instantiate_from_config({**described, "target": _MOVED.get(target, target)} if target else described)
    except (UserError, MisconfigurationException) as error:
        raise UserError(f"{where}: {error}") from error
