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

# transformers imports torchao where it is installed, which tells of kernels that this machine lacks and nobody uses,
# and which registers its types in a way that torch warns about.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` or an `OSError` on a named file becomes one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
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
