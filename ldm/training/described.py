"""Construction of the objects that the section `lightning` of a config describes, and checks of their paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.files import check_within, is_within
from ldm.util import UserError, instantiate_from_config, located

# Replacements of classes: those of 2022 that Lightning no longer has, and its ModelCheckpoint, which ranks checkpoints
# by scores of weights that no longer exist.
MOVED = {
    "pytorch_lightning.callbacks.ModelCheckpoint": "ldm.callbacks.kept.KeptCheckpoints",
    "lightning.pytorch.callbacks.ModelCheckpoint": "ldm.callbacks.kept.KeptCheckpoints",
    "pytorch_lightning.loggers.TestTubeLogger": "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.plugins.DDPPlugin": "pytorch_lightning.strategies.DDPStrategy",
}
# Parameters of callbacks for the folders that they write to, and for file names in such a folder.
_FOLDERS = ("dirpath", "logdir", "ckptdir", "cfgdir")
_FILES = ("filename", "path", "now")


def moved(target: Any) -> Any:
    """Return the replacement of the class `target`, or `target` itself."""
    return MOVED.get(target, target) if isinstance(target, str) else target


def check_callback_places(described: Any, folder: Path, where: str) -> None:
    """Raise `UserError` if a path in the params of a `described` callback lies outside the run's `folder`."""
    params = described.get("params") if isinstance(described, Mapping) else None
    if not isinstance(params, Mapping):
        return
    for name in _FOLDERS:
        if params.get(name) is not None:
            check_within(folder, Path(str(params[name])).expanduser(), f"{where}.params.{name}")
    bases = [Path(str(params[name])) for name in _FOLDERS if params.get(name) is not None]
    for name in _FILES:
        for base in bases or [folder / "checkpoints"]:
            if params.get(name) is not None:
                check_within(folder, base / str(params[name]), f"{where}.params.{name}")


def check_logger_places(params: Any, folder: Path, where: str) -> None:
    """Raise `UserError` if a text in the `params` of a logger is a path out of `folder`."""
    for text in _texts(params):
        if not is_within(folder, text):
            check_within(folder, folder / text, where)


def check_logger(logger: Logger, folder: Path, where: str) -> None:
    """Raise `UserError` unless the folders of the built `logger` lie in the run's `folder`."""
    for name in ("save_dir", "root_dir", "log_dir"):
        place = getattr(logger, name, None)
        if isinstance(place, (str, Path)):
            check_within(folder, place, f"{where}: {name}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, (str, Path)):
        yield str(value)


def instantiate_described(described: Mapping[str, Any], where: str) -> Any:
    """Call `instantiate_from_config` with the replacements of `MOVED`, and name `where` in its errors."""
    target = described.get("target")
    try:
        with located(where):
            return instantiate_from_config({**described, "target": moved(target)} if target else described)
    except MisconfigurationException as error:
        values = ", ".join(f"{key}={value!r:.100}" for key, value in (described.get("params") or {}).items())
        raise UserError(f"{where}: {' '.join(str(error).split())} (given: {values})") from error
