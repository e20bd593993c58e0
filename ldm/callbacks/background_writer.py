"""Writing of a checkpoint in a thread, from a copy of its tensors, while training continues."""

from __future__ import annotations

import errno
import logging
import mmap
import threading
from collections.abc import Callable, Sequence

import torch

from ldm.checkpoint import Pending, PickledCheckpoint, copy_value
from ldm.host_memory import available_memory

log = logging.getLogger(__name__)

_SPARE = 2 << 30  # bytes of host memory that a copy leaves free
_LARGE = 1 << 20  # bytes from which a tensor on the host may be copied by the thread

Write = Callable[[PickledCheckpoint], None]
Pair = tuple[torch.Tensor, torch.Tensor | Pending]  # the place of a copy, and what is copied


class BackgroundWriter:
    """Writer of one checkpoint at a time. If host memory is short, it writes at once, and the caller waits."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copied = threading.Event()
        self._has_told = False
        self._copies_at_once = False

    @property
    def is_busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, checkpoint: PickledCheckpoint, write: Write, copy_later: bool = False) -> None:
        """Copy the tensors of `checkpoint`, and call `write` with the copy in a thread.

        Call `finish` before the next `start`. With `copy_later`, the thread also copies the large tensors on the host:
        call `wait_for_copy` before they change. If they change earlier, nothing is written, `finish` raises, and later
        checkpoints are copied at once.

        Raises:
            OSError, UserError: memory was short, so `write` was called at once, and failed.
        """
        assert self._thread is None
        memory = self._memory_for(checkpoint)
        if memory is None:
            write(checkpoint)
            return
        copy = checkpoint.placed_in(memory)
        later: list[Pair] = []
        for place, tensor in zip(copy.tensors, checkpoint.tensors, strict=True):
            if copy_later and not self._copies_at_once and _can_wait(tensor):
                later.append((place, tensor))
            else:
                copy_value(place, tensor)
        self._copied.clear()
        arguments = (write, copy, later, _versions(later))
        # A process that quits at once does not wait for a daemon. The unfinished file is removed at the next start.
        thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        thread.start()
        self._thread = thread  # one that the system refuses is not waited for

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

    def _run(self, write: Write, copy: PickledCheckpoint, later: list[Pair], versions: list[int]) -> None:
        try:
            try:
                self._copy(later, versions)
            finally:
                later.clear()  # the tensors need not stay as long as the writing
                self._copied.set()
            write(copy)
        except BaseException as error:
            self._error = error

    def _copy(self, later: Sequence[Pair], versions: Sequence[int]) -> None:
        for place, tensor in later:
            copy_value(place, tensor)
        if _versions(later) != versions:
            self._copies_at_once = True
            reason = "weights changed while they were copied; from now on, training waits for the copy"
            raise OSError(errno.EBUSY, reason)

    def wait_for_copy(self) -> None:
        """Wait until all tensors of the checkpoint are copied."""
        if self._thread is not None:
            self._copied.wait()

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


def _can_wait(tensor: torch.Tensor | Pending) -> bool:
    """Return True for a large tensor on the host whose changes torch counts."""
    is_on_host = isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
    return is_on_host and tensor.nbytes >= _LARGE and not tensor.is_inference()


def _versions(pairs: Sequence[Pair]) -> list[int]:
    """Return torch's count of the changes in place of each tensor, which views share."""
    return [tensor._version for _, tensor in pairs]
