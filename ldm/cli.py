"""What every command line shares: logging, one-line errors and exit codes. Imports no torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from ldm.util import UserError

# Where the 2022 tutorials put the released weights, and where runs put theirs.
CONVENTIONAL_RELEASE = Path("models/ldm/stable-diffusion-v1/model.ckpt")
LOGS = Path("logs")


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` or an `OSError` on a named file becomes one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        sys.exit(f"error: {error.filename or ''}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


def newest_checkpoint(logs: Path = LOGS) -> Path:
    """The `last.ckpt` written last among the runs under `logs`.

    Raises:
        UserError: there is none.
    """
    found = sorted(logs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no {logs}/*/checkpoints/last.ckpt; name the training checkpoint with --train-ckpt")
    return found[-1]
