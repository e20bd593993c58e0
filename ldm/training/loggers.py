"""Loggers of a run: CSV, and TensorBoard or the logger of `lightning.logger`."""

from __future__ import annotations

from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger

from ldm.callbacks.tolerance import tolerant
from ldm.config.load import plain
from ldm.training.described import check_logger, check_logger_places, instantiate_described, moved
from ldm.training.run import Run
from ldm.util import UserError

_DEFAULT_LOGGER = "pytorch_lightning.loggers.TensorBoardLogger"


def build_loggers(config: DictConfig, run: Run, project: str | None) -> list[Logger] | bool:
    """Return the loggers of a run: TensorBoard or the logger of `lightning.logger`, and CSV; False if turned off.

    Raises:
        UserError: `lightning.logger` is not a logger, needs a package that is not installed, or would write
            outside the run folder.
    """
    if not logs_anything(config):
        return False
    section = plain(config.lightning.get("logger"))
    if section is not None and section is not True and not isinstance(section, dict):
        raise UserError(f"lightning.logger {section!r}: give a mapping with target and params, or false for no logger")
    described = {"target": _DEFAULT_LOGGER, **(section if isinstance(section, dict) else {})}
    params = {"save_dir": str(run.folder), **(described.get("params") or {})}
    target = str(moved(described["target"]))
    if target.endswith("TensorBoardLogger"):
        params = {"name": "tensorboard", "version": "", **params}
    elif target.endswith("WandbLogger"):
        params = {"name": run.folder.name, **params}
        if project:
            params["project"] = project
    check_logger_places(params, run.folder, "lightning.logger.params")
    try:
        logger = instantiate_described({**described, "params": params}, "lightning.logger")
        check_logger(logger, run.folder, "lightning.logger")
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"lightning.logger: {target} needs a package that is not installed ({error})") from error
    except Exception as error:  # of a service, such as that nobody is logged in
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"lightning.logger: {target} cannot be started ({reason})") from error
    return [tolerant(logger), tolerant(CSVLogger(str(run.folder), name="csv"))]


def logs_anything(config: DictConfig) -> bool:
    """Return False if `lightning.logger` or `lightning.trainer.logger` is false, which turns all loggers off."""
    return config.lightning.get("logger") is not False and config.lightning.trainer.get("logger") is not False
