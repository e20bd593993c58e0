"""Entry point shared by all commands: logging, one-line errors and exit codes. Imports no torch."""

from __future__ import annotations

import argparse
import errno
import gc
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

from ldm.cli.streams import tolerant_streams
from ldm.files import exit_on_bus_error, leave_closed_terminal
from ldm.printable import escaped, printable
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)


# transformers imports torchao if it is installed. torchao logs missing kernels that this program does not use, and its
# registration of types makes torch warn.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


NO_MEMORY = "this machine has too little memory left: use a smaller batch and fewer data workers, or end other programs"
# Messages of the plain RuntimeErrors that torch and Python raise if the host has no memory left.
_ALLOCATION_FAILED = (
    *("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc"),
    "can't start new thread",  # of Python, which has no stack for it
)


def run(main: Callable[[], None]) -> None:
    """Call `main` and turn expected errors into one line on stderr and exit code 1.

    Expected errors are `UserError`, errors of the operating system, and a lack of host or GPU memory. SIGTERM raises
    `SystemExit(143)` and SIGHUP (a closed terminal) `SystemExit(129)`, so that unfinished files are removed.
    """
    with tolerant_streams():
        _run(main)


def _run(main: Callable[[], None]) -> None:
    # Imports make half a million objects. Searching all of them for garbage seven times took an eighth of a start.
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    if hasattr(sys.stdout, "reconfigure"):
        # As on stderr, so that every locale can print every file name.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    threading.excepthook = _log_thread_error
    exit_on_bus_error()
    try:
        with _signals_raise(), _bars_closed():
            main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno == errno.ENOMEM:
            sys.exit(f"error: {NO_MEMORY}")
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(printable(f"error: {where}{error.strerror or error}"))
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
        if str(error).startswith("Could not determine home directory"):  # of Path.expanduser
            sys.exit("error: a path begins with ~, and there is no such home folder; write the path in full")
        if str(error).startswith("DataLoader worker"):
            sys.exit(
                f"error: {str(error).splitlines()[0]}: it may have been killed for lack of memory; use fewer workers"
            )
        if type(error).__name__ != "OutOfMemoryError":  # torch.OutOfMemoryError, of a GPU
            raise
        sys.exit(
            f"error: {escaped(str(error).split('. ')[0])}; use a smaller batch, with --batch-size if the command has it"
        )
    except KeyboardInterrupt:
        sys.exit(130)


class Lines(str):
    """Text whose line ends a log message keeps."""


class PrintableFormatter(logging.Formatter):
    """Formatter that prints the message alone, without secrets and with control characters escaped.

    Text from files and configs thus cannot move the cursor or begin a line. Line ends are kept in the format string and
    in arguments of type `Lines`.
    """

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record = logging.makeLogRecord({**vars(record), "args": tuple(map(_one_line, record.args))})
        return printable(super().format(record), keep="\n\t")


def _one_line(argument: object) -> object:
    if isinstance(argument, (Lines, int, float)):
        return argument
    return escaped(text) if (text := str(argument)) != escaped(text) else argument


def is_host_memory_error(error: BaseException) -> bool:
    """Return True if `error` means that the host has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)
    )


def _log_thread_error(failed: threading.ExceptHookArgs) -> None:
    """Log an error of the operating system in a thread as one line, for example of a logger on a full disk."""
    if isinstance(failed.exc_value, OSError):
        name = failed.thread.name if failed.thread else "unknown"
        logger.error("error in the background thread %s: %s", name, failed.exc_value)
    else:
        threading.__excepthook__(failed)


@contextmanager
def _bars_closed() -> Iterator[None]:
    """Close the progress bars that an error leaves open, so that the next message begins a line."""
    try:
        yield
    finally:
        if "tqdm" in sys.modules:
            for bar in list(sys.modules["tqdm"].tqdm._instances):
                bar.close()


@contextmanager
def _signals_raise() -> Iterator[None]:
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            if signum == signal.SIGHUP:
                leave_closed_terminal()
            raise SystemExit(128 + signum)
        signal.signal(signum, signal.SIG_DFL)  # a forked worker; its parent cleans up
        os.kill(os.getpid(), signum)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # set by nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter that keeps the layout of the docstring, and shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, []) and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def call(*words: object) -> None:
    """Print a command as a user would type it, and run it with this Python.

    Raises:
        UserError: the command failed. It has printed the reason.
    """
    command = [str(word) for word in words]
    logger.info("\n$ %s", shlex.join(["python", *command]))
    started = time.monotonic()
    status = subprocess.run([sys.executable, *command]).returncode
    refuse_if(status, f"the command above failed with exit code {status}")
    logger.info("(%.0f s)", time.monotonic() - started)
