"""Loggers of a run: CSV, and TensorBoard or what `lightning.logger` describes."""

from __future__ import annotations

from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger

from ldm.config.load import plain
from ldm.training.described import MOVED, check_logger, check_logger_places, instantiate_described
from ldm.training.run import Run
from ldm.util import UserError

_DEFAULT_LOGGER = "pytorch_lightning.loggers.TensorBoardLogger"


def build_loggers(config: DictConfig, run: Run, project: str | None) -> list[Logger] | bool:
    """Return a CSV logger, and TensorBoard or the logger that `lightning.logger` describes.

    Raises:
        UserError: the logger cannot be built, or would write outside the run folder.
    """
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
    check_logger_places(params, run.folder, "lightning.logger.params")
    try:
        logger = instantiate_described({**described, "params": params}, "lightning.logger")
    except ModuleNotFoundError as error:
        raise UserError(f"lightning.logger: {target} needs a package that is not installed ({error})") from error
    check_logger(logger, run.folder, "lightning.logger")
    return [logger, CSVLogger(str(run.folder), name="csv")]
