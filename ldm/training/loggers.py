"""Loggers of a run: CSV, and TensorBoard or what `lightning.logger` describes."""

from __future__ import annotations

from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger

from ldm.callbacks.tolerance import tolerant
from ldm.config.load import plain
from ldm.training.described import MOVED, instantiate_described
from ldm.training.run import Run
from ldm.util import UserError

_DEFAULT_LOGGER = "pytorch_lightning.loggers.TensorBoardLogger"


def build_loggers(config: DictConfig, run: Run, project: str | None) -> list[Logger] | bool:
    """A CSV logger, and TensorBoard or what `lightning.logger` describes."""
    if config.lightning.trainer.get("logger") is False:
        return False
    described = {"target": _DEFAULT_LOGGER, **plain(config.lightning.get("logger") or {})}
    params = {"save_dir": str(run.folder), **(described.get("params") or {})}
    target = MOVED.get(described["target"], described["target"])
    if target.endswith("TensorBoardLogger"):
        params = {"name": "tensorboard", "version": "", **params}
    elif target.endswith("WandbLogger"):
        params = {"name": run.folder.name, **params}
        if project:
            params["project"] = project
    try:
        logger = instantiate_described({**described, "params": params}, "lightning.logger")
    except ModuleNotFoundError as error:
        raise UserError(f"lightning.logger: {target} needs a package that is not installed ({error})") from error
    return [tolerant(logger), tolerant(CSVLogger(str(run.folder), name="csv"))]
