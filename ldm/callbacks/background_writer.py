"""Writing of a checkpoint in a thread, from a copy of its tensors, while training continues."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ldm.checkpoint import PickledCheckpoint
from ldm.host_memory import available_memory

log = logging.getLogger(__name__)

_SPARE = 2 << 30  # bytes of host memory that a copy leaves free


class BackgroundWriter:
    """Writer of one checkpoint at a time. If host memory is short, it writes at once, and the caller waits."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._has_told = False

    @property
    def is_busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, checkpoint: PickledCheckpoint, write: Callable[[PickledCheckpoint], None]) -> None:
        """Copy the tensors of `checkpoint`, and call `write` with the copy in a thread.

        Call `finish` before the next `start`.

        Raises:
            OSError, UserError: memory was short, so `write` was called at once, and failed.
        """
        assert self._thread is None
        available = available_memory()
        if available is None or available < checkpoint.nbytes + _SPARE:
            if available is not None and not self._has_told:
                self._has_told = True
                log.info(
                    "\nTraining waits while a checkpoint is written: a copy takes %.1f GB of host memory, and %.1f GB "
                    "are available",
                    checkpoint.nbytes / 1e9,
                    available / 1e9,
                )
            write(checkpoint)
            return
        # A process that quits at once does not wait for a daemon. The unfinished file is removed at the next start.
        self._thread = threading.Thread(target=self._run, args=(write, checkpoint.copied()), daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[PickledCheckpoint], None], checkpoint: PickledCheckpoint) -> None:
        try:
            write(checkpoint)
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wait until the checkpoint is written, if there is one.

        Raises:
            OSError, UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
