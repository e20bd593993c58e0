"""Trainer and learning rate from the section `lightning` of a config."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.callbacks.accumulation import accumulation_at_start
from ldm.callbacks.validation import ValidationAcrossEpochs
from ldm.config.load import load_config, plain
from ldm.data.base_module import BaseDataModule
from ldm.distributed.ranks import launched
from ldm.printable import hidden_keys
from ldm.processor import quick_dtype
from ldm.training.arguments import Arguments
from ldm.training.compatibility import check_trains_as_written
from ldm.training.described import instantiate_described
from ldm.training.precision import Bfloat16Weights, ClippedMixedPrecision
from ldm.training.preview_setup import add_previews
from ldm.training.quiet import silence_lightning
from ldm.training.resume import AtomicCheckpointIO, TrainingCheckpoint
from ldm.training.run import Run
from ldm.training.strategies import PartitionedStrategy, check_launch, choose_strategy, trains_on_gpu
from ldm.training.trainer_2022 import check_names, is_single, merge_arguments, move_old_keys, translate_arguments
from ldm.training.trainer_values import check_values, without_nulls
from ldm.util import UserError, nearest, refuse_if

log = logging.getLogger(__name__)

_LIGHTNING_KEYS = (
    "trainer",
    "callbacks",
    "logger",
    "modelcheckpoint",
    "strategy",
    "find_unused_parameters",
    "metrics_over_trainsteps_checkpoint",
    "scale_lr",  # the switch --scale_lr, saved with the run
    "report",  # false writes no report at the end
    "previews",
)


# Lightning's spellings of mixed precision → their canonical names.
_MIXED = {"bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed", "16-mixed": "16-mixed", "16": "16-mixed", 16: "16-mixed"}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def merge_config(arguments: Arguments, run: Run) -> DictConfig:
    """Return the config of a run: its saved configs, then `--base` left to right, then the command line.

    Raises:
        UserError: a config cannot be read or needs trust, or a key of the section `lightning` or a Trainer argument
            does not exist.
    """
    valid = set(inspect.signature(Trainer).parameters)
    check_names(arguments.trainer, valid, "option --{}")
    config = load_config([*run.saved_configs, *arguments.base], arguments.overrides, arguments.trust_config)
    if config.get("lightning") is None:  # `setdefault` of a DictConfig returns a plain default that it does not store
        config["lightning"] = {}
    if hidden := hidden_keys(OmegaConf.to_container(config)):
        key = hidden[0]
        raise UserError(f"{key}: the run has not saved its password; type {key}=... again, or use ${{oc.env:NAME}}")
    section = config.lightning
    for key in section:
        if key not in _LIGHTNING_KEYS:
            raise UserError(f"unknown key lightning.{key}{nearest(str(key), list(_LIGHTNING_KEYS))}")
    for key in ("trainer", "callbacks", "modelcheckpoint"):
        if section.get(key) is not None and not isinstance(section[key], DictConfig):
            raise UserError(f"lightning.{key} {plain(section[key])!r:.100}: give a mapping")
    move_old_keys(section)
    if arguments.scale_lr is not None:
        section["scale_lr"] = arguments.scale_lr
    if section.get("scale_lr") is None:
        section["scale_lr"] = True
    if not isinstance(section["scale_lr"], bool):
        raise UserError(f"lightning.scale_lr {section['scale_lr']!r}: give true or false")
    if section.get("report") not in (None, True, False):
        raise UserError(f"lightning.report {section['report']!r}: give true or false")
    add_previews(section, arguments.previews)
    section["trainer"] = merge_arguments(plain(section.get("trainer") or {}), arguments.trainer)
    check_names(section["trainer"], valid, "key lightning.trainer.{}")
    section["trainer"] = without_nulls(plain(section["trainer"]))
    check_values(plain(section["trainer"]))
    if arguments.train:
        check_trains_as_written(config)
    return config


def build_trainer(
    config: DictConfig,
    model: LightningModule,
    data: LightningDataModule,
    callbacks: list[Callback],
    loggers: list[Logger] | bool,
    run: Run,
    checkpoint: TrainingCheckpoint | None,
) -> Trainer:
    """Build the Trainer of `config.lightning` for `model` and `data`. It resumes from `checkpoint` if there is one.

    Raises:
        UserError: Lightning refuses the value of an argument, or the value does not work with the model.
    """
    has_cuda = torch.cuda.is_available()
    given, launch = plain(config.lightning.trainer), launched()
    if launch:
        given.setdefault("num_nodes", launch.machines)
    given = translate_arguments(given, has_cuda=has_cuda, launched=launch.processes if launch else 1)
    if launch:
        check_launch(given, launch)
    described = "auto" if is_single(given) else _described_strategy(config.lightning)
    given["strategy"] = choose_strategy(given, model, described, has_cuda)
    if isinstance(given["strategy"], PartitionedStrategy):
        given["inference_mode"] = False  # weights gathered in validation are used by training afterwards
    if any(isinstance(callback, ValidationAcrossEpochs) for callback in callbacks):
        given["check_val_every_n_epoch"] = None
    if isinstance(data, BaseDataModule):  # it gives each process its own share
        given["use_distributed_sampler"] = False
    given |= {
        "callbacks": callbacks,
        "default_root_dir": str(run.folder),
        "enable_checkpointing": True,  # LastCheckpoint decides when to write
        "logger": loggers,
        "plugins": [AtomicCheckpointIO(run.folder, checkpoint)],
    }
    if given.get("precision") == "bf16-true":
        del given["precision"]  # Lightning takes either the name or the plugin
        given["plugins"].append(Bfloat16Weights())
    elif given.get("precision") in _MIXED:
        precision = _MIXED[given.pop("precision")]
        device = "cuda" if trains_on_gpu(given, has_cuda) else "cpu"
        if quick_dtype(_AUTOCAST[precision], torch.device(device), f"--precision {precision}") != torch.float32:
            given["plugins"].append(ClippedMixedPrecision(precision, device))
    silence_lightning()
    try:
        return Trainer(**given)
    except (MisconfigurationException, ImportError, ValueError, TypeError, RuntimeError) as error:
        # ImportError: a package for a precision, a strategy, a profiler or a device; RuntimeError: Slurm.
        values = ", ".join(f"{key}={value!r}" for key, value in plain(config.lightning.trainer).items())
        raise UserError(f"lightning.trainer: {' '.join(str(error).split())} (given: {values})") from error


def set_learning_rate(model: LightningModule, config: DictConfig, trainer: Trainer) -> None:
    """Set `model.learning_rate` from `model.base_learning_rate`, times the images per step if `lightning.scale_lr`.

    An `lr` in the optimizer's params takes precedence and is not scaled.

    Raises:
        UserError: the config has no base learning rate, or no batch size to scale it by.
    """
    base = config.model.get("base_learning_rate")
    refuse_if(
        not isinstance(base, (int, float)) or not 0 <= base < math.inf,
        f"model.base_learning_rate {base!r}: give a number of at least 0, such as model.base_learning_rate=1e-5",
    )
    own = _own_rate(getattr(model, "optimizer_config", None))
    if own is not None:
        model.learning_rate = own
        log.info("Learning rate %.3e (the optimizer's own lr; base_learning_rate is not used)", own)
        return
    if not config.lightning.scale_lr:
        model.learning_rate = base
        log.info("Learning rate %.3e (not scaled)", base)
        return
    batch_size = ((config.get("data") or {}).get("params") or {}).get("batch_size")
    refuse_if(
        batch_size is None,
        "data.params.batch_size is missing, which scales the learning rate; give it, or --scale_lr False",
    )
    accumulate, devices = accumulation_at_start(trainer), trainer.world_size
    model.learning_rate = accumulate * devices * batch_size * base
    log.info(
        "Learning rate %.3e = %d (accumulated batches) * %d (devices) * %d (batch size) * %.3e (base_learning_rate)",
        model.learning_rate, accumulate, devices, batch_size, base,
    )  # fmt: skip


def _own_rate(optimizer: Mapping[str, Any] | None) -> float | None:
    """Return the `lr` in the `params` of the inner optimizer, else of `optimizer` itself, else None."""
    params = (optimizer or {}).get("params") or {}
    inner = params.get("optimizer")
    own = _own_rate(inner) if isinstance(inner, Mapping) else None
    return params.get("lr") if own is None else own


def _described_strategy(section: DictConfig) -> Any:
    described = section.get("strategy")
    if isinstance(described, str):
        return described
    if described:
        return instantiate_described(plain(described), "lightning.strategy")
    return "ddp_find_unused_parameters_true" if section.get("find_unused_parameters") else "auto"
