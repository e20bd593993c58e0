"""Writing what training can do without: logs and images. An error there is a warning, and training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from ldm.util import UserError

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_TRIES = 30.0  # of a TensorBoard writer, which takes a thread and a file for each
_WRITES = ("log_metrics", "log_hyperparams", "log_graph", "log_image", "save", "finalize", "after_save_checkpoint")


class Tolerance:
    """Says once that `what` cannot be written, and once that it can again."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._failed = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self.fail(error)
        else:
            self.succeed()

    def fail(self, error: Exception) -> None:
        if not self._failed:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("\n%s cannot be written (%s); training goes on without", self.what, reason)
        self._failed = True

    def succeed(self) -> None:
        if self._failed:
            log.info("\n%s can be written again", self.what)
        self._failed = False


class _Nowhere:
    """Takes any call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class TolerantLogger:
    """The writing methods of a Lightning logger, with errors turned into warnings.

    A logger stays an instance of its class: `tolerant` replaces methods of the one instance.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.tolerance = Tolerance(f"The log of {type(logger).__name__}")
        self._next_try = 0.0

    def call(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if time.monotonic() < self._next_try:
            return None
        before = _csv_content(self.logger)
        try:
            result = write(*arguments, **options)
        except UserError:
            raise
        except Exception as error:
            self._put_back(before)
            self.tolerance.fail(error)
            return None
        if write.__name__ in ("save", "log_image") and time.monotonic() >= self._next_try:
            self.tolerance.succeed()
        return result

    def experiment(self, create: Callable[[Logger], Any]) -> Any:
        """Return what `create` makes of the logger, or something that takes all writes where that fails."""
        if time.monotonic() >= self._next_try:
            try:
                return create(self.logger)
            except UserError:
                raise
            except Exception as error:
                self.logger._experiment = None
                self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
                self.tolerance.fail(error)
        return _Nowhere()

    def _put_back(self, before: tuple[Path, bytes, list[str]] | None) -> None:
        """Mend the logger after a failed write: no line of a CSV file half written, no dead TensorBoard thread."""
        if isinstance(self.logger, TensorBoardLogger):
            self.logger._experiment = None  # the next write opens a file of its own
            self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
        if before is not None:
            path, content, keys = before
            self.logger.experiment.metrics_keys = keys
            with suppress(OSError):
                if content:
                    with path.open("r+b") as file:  # in place: the room that the file has is its own
                        file.write(content)
                        file.truncate()
                else:
                    path.unlink(missing_ok=True)


def _csv_content(logger: Logger) -> tuple[Path, bytes, list[str]] | None:
    """The file of a CSV logger that is about to be written, if it has one, and its columns."""
    experiment = getattr(logger, "_experiment", None)
    if not isinstance(logger, CSVLogger) or experiment is None or not experiment.metrics:
        return None
    path = Path(experiment.metrics_file_path)
    return path, path.read_bytes() if path.is_file() else b"", list(experiment.metrics_keys)


def tolerant(logger: Logger) -> Logger:
    """Let no error of `logger` end the training; returns it."""
    guard, kind = TolerantLogger(logger), type(logger)
    create = getattr(kind, "experiment", None)
    if isinstance(create, property):  # Lightning reads it before the first step
        experiment = property(lambda self: guard.experiment(create.fget))
        logger.__class__ = type(kind.__name__, (kind,), {"experiment": experiment})
    for name in _WRITES:
        method = getattr(logger, name, None)
        if method is not None:
            setattr(logger, name, partial(guard.call, method))
    return logger


def write_tolerantly(logger: Logger, write: Callable[..., Any], *arguments: Any) -> None:
    """Call `write`, which writes to `logger` past its methods; a `tolerant` logger's errors are warnings here too."""
    method = logger.log_metrics
    guard = getattr(method.func, "__self__", None) if isinstance(method, partial) else None
    if isinstance(guard, TolerantLogger):
        guard.call(write, *arguments)
    else:
        write(*arguments)
