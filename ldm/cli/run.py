"""What every command line shares: logging, one-line errors and exit codes. Imports no torch."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ldm.files import exit_on_bus_error, leave_closed_terminal
from ldm.util import UserError, escaped

logger = logging.getLogger(__name__)


# transformers imports torchao where it is installed, which tells of kernels that this machine lacks and nobody uses,
# and which registers its types in a way that torch warns about.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


NO_MEMORY = "this machine has too little memory left: use a smaller batch and fewer data workers, or end other programs"
# What torch says where the host's memory ends, in a plain RuntimeError.
_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError`, an error of the operating system or a full GPU becomes one line on stderr and exit
    code 1.

    SIGTERM becomes `SystemExit(143)`, and SIGHUP (a closed terminal) `SystemExit(129)`: what is half written is
    removed.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: any file name can be printed in any locale
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    threading.excepthook = _say_of_thread
    exit_on_bus_error()
    try:
        with _signals_unwind(), _bars_ended():
            main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno == errno.ENOMEM:
            sys.exit(f"error: {NO_MEMORY}")
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(escaped(f"error: {where}{error.strerror or error}"))
    except MemoryError:
        sys.exit(f"error: {NO_MEMORY}")
    except UnicodeError as error:
        if sys.getfilesystemencoding() == "utf-8" and not isinstance(error, UnicodeEncodeError):
            raise
        name = ascii(error.object)[:200]
        sys.exit(
            f"error: {name} does not fit the encoding {error.encoding} of this locale; "
            "set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8"
        )
    except RuntimeError as error:
        if is_host_memory_error(error):
            sys.exit(f"error: {NO_MEMORY}")
        if str(error).startswith("DataLoader worker"):
            sys.exit(f"error: {str(error).splitlines()[0]}: was it killed for want of memory? use fewer workers")
        if type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        sys.exit(f"error: {escaped(str(error).split('. ')[0])}; take fewer at a time, where there is a --batch-size")
    except KeyboardInterrupt:
        sys.exit(130)


class Lines(str):
    """A text of several lines that a log message may hold as they are."""


class PrintableFormatter(logging.Formatter):
    """The message alone, in which what comes from files and configs cannot move the cursor or begin a line.

    Line ends stay in the format of a message, and in arguments that are `Lines`. Every other control character is
    escaped.
    """

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record = logging.makeLogRecord({**vars(record), "args": tuple(map(_one_line, record.args))})
        return escaped(super().format(record), keep="\n\t")


def _one_line(argument: object) -> object:
    if isinstance(argument, (Lines, int, float)):
        return argument
    return escaped(text) if (text := str(argument)) != escaped(text) else argument


def is_host_memory_error(error: BaseException) -> bool:
    """Return whether `error` says that the host has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _ALLOCATION_FAILED)
    )


def _say_of_thread(failed: threading.ExceptHookArgs) -> None:
    """An error of the operating system in a thread, as of a logger on a full disk, is one line too."""
    if isinstance(failed.exc_value, OSError):
        logger.error("error: %s", failed.exc_value)
    else:
        threading.__excepthook__(failed)


@contextmanager
def _bars_ended() -> Iterator[None]:
    """Close the progress bars that an error leaves open: what is said next begins a line."""
    try:
        yield
    finally:
        if "tqdm" in sys.modules:
            for bar in list(sys.modules["tqdm"].tqdm._instances):
                bar.close()


@contextmanager
def _signals_unwind() -> Iterator[None]:
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            if signum == signal.SIGHUP:
                leave_closed_terminal()
            raise SystemExit(128 + signum)
        signal.signal(signum, signal.SIG_DFL)  # a forked worker, whose clean-up is its parent's
        os.kill(os.getpid(), signum)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and the defaults of the options that have any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, []) and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def call(*words: object) -> None:
    """Print a command as a user would type it, and run it with this Python.

    Raises:
        UserError: it failed; it has said why.
    """
    command = [str(word) for word in words]
    logger.info("\n$ %s", shlex.join(["python", *command]))
    started = time.monotonic()
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        raise UserError(f"that command ended with exit code {status}")
    logger.info("(%.0f s)", time.monotonic() - started)
