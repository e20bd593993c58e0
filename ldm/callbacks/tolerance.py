"""Tolerant writing of logs and images: an error gives a warning, and training continues."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from ldm.util import UserError

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_TRIES = 30.0  # for TensorBoard, where each try makes a thread and a file
_WRITES = ("log_metrics", "log_hyperparams", "log_graph", "log_image", "save", "finalize", "after_save_checkpoint")


class Tolerance:
    """Context that turns errors into one warning that `what` cannot be written, and logs once when it can again."""

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
            lines = (line.strip() for line in str(error).splitlines())
            reason = next(filter(None, lines), type(error).__name__)
            log.warning("\n%s cannot be written (%s); training continues without it", self.what, reason)
        self._failed = True

    def succeed(self) -> None:
        if self._failed:
            log.info("\n%s can be written again", self.what)
        self._failed = False


class _NullWriter:
    """Object whose methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class TolerantLogger:
    """Guard of the writing methods of a Lightning logger, which turns their errors into warnings.

    `tolerant` replaces the methods of one instance by this guard. The instance keeps its class.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.tolerance = Tolerance(f"The log of {type(logger).__name__}")
        self._next_try = 0.0

    def call(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if time.monotonic() < self._next_try:
            return None
        before = None
        try:
            before = _csv_state(self.logger)
            result = write(*arguments, **options)
        except UserError:
            raise
        except Exception as error:
            self._restore(before)
            self.tolerance.fail(error)
            return None
        if write.__name__ in ("save", "log_image") and time.monotonic() >= self._next_try:
            self.tolerance.succeed()
        return result

    def experiment(self, create: Callable[[Logger], Any]) -> Any:
        """Return the result of `create`, or an object that ignores all writes if it fails."""
        if time.monotonic() >= self._next_try:
            try:
                return create(self.logger)
            except UserError:
                raise
            except Exception as error:
                self.logger._experiment = None
                self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
                self.tolerance.fail(error)
        return _NullWriter()

    def _restore(self, before: _CsvState | None) -> None:
        """Undo a failed write.

        The CSV file gets its content of `before`. TensorBoard's writer is dropped, because its thread has ended.
        """
        if isinstance(self.logger, TensorBoardLogger):
            self.logger._experiment = None  # the next write opens a new file
            self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
        if before is not None:
            self.logger.experiment.metrics_keys = before.keys
            with suppress(OSError):
                if before.size:
                    with before.path.open("r+b") as file:  # in place, which needs no more disk space
                        file.write(before.content)
                        file.truncate(before.size)
                else:
                    before.path.unlink(missing_ok=True)


class _CsvState(NamedTuple):
    """A CSV file before it is written: its size and columns, and its content if a new column means to write it anew."""

    path: Path
    size: int
    keys: list[str]
    content: bytes


def _csv_state(logger: Logger) -> _CsvState | None:
    """Return the state of the file that a CSV logger will write; None for other loggers."""
    experiment = getattr(logger, "_experiment", None)
    if not isinstance(logger, CSVLogger) or experiment is None or not experiment.metrics:
        return None
    path, keys = Path(experiment.metrics_file_path), list(experiment.metrics_keys)
    size = path.stat().st_size if path.is_file() else 0
    is_rewritten = size > 0 and not set().union(*experiment.metrics) <= set(keys)
    return _CsvState(path, size, keys, path.read_bytes() if is_rewritten else b"")


def tolerant(logger: Logger) -> Logger:
    """Turn the errors of `logger` into warnings, and return it."""
    guard, kind = TolerantLogger(logger), type(logger)
    create = getattr(kind, "experiment", None)
    if isinstance(create, property):  # Lightning reads this property before the first step
        experiment = property(lambda self: guard.experiment(create.fget))
        logger.__class__ = type(kind.__name__, (kind,), {"experiment": experiment})
    for name in _WRITES:
        method = getattr(logger, name, None)
        if method is not None:
            setattr(logger, name, partial(guard.call, method))
    return logger


def write_tolerantly(logger: Logger, write: Callable[..., Any], *arguments: Any) -> None:
    """Call `write` with `arguments`; if `logger` is tolerant, an error gives a warning."""
    method = logger.log_metrics
    guard = getattr(method.func, "__self__", None) if isinstance(method, partial) else None
    if isinstance(guard, TolerantLogger):
        guard.call(write, *arguments)
    else:
        write(*arguments)
