"""Writing of a checkpoint in a thread, from a copy of its tensors, while training continues."""

from __future__ import annotations

import logging
import mmap
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
        memory = self._memory_for(checkpoint)
        if memory is None:
            write(checkpoint)
            return
        # A process that quits at once does not wait for a daemon. The unfinished file is removed at the next start.
        self._thread = threading.Thread(target=self._run, args=(write, checkpoint.copied(memory)), daemon=True)
        self._thread.start()

    def _memory_for(self, checkpoint: PickledCheckpoint) -> mmap.mmap | None:
        """Return memory for a copy; None if the machine has too little, or does not tell how much it has."""
        available = available_memory()
        if available is None:
            return None
        if available >= checkpoint.nbytes + _SPARE:
            try:
                return checkpoint.memory_for_copy()
            except OSError as error:  # a limit of the process, such as that of `ulimit -v`
                self._tell(checkpoint, f"the system refuses it: {error.strerror}")
                return None
        self._tell(checkpoint, f"{available / 1e9:.1f} GB are available")
        return None

    def _tell(self, checkpoint: PickledCheckpoint, reason: str) -> None:
        if not self._has_told:
            self._has_told = True
            log.info(
                "\nTraining waits while a checkpoint is written: a copy takes %.1f GB of host memory, and %s",
                checkpoint.nbytes / 1e9,
                reason,
            )

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
