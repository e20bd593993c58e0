"""SIGUSR1, Ctrl-C, SIGTERM and SIGHUP as wishes that training grants at its next step. Imports no torch."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType
from typing import Any

from ldm.files import leave_closed_terminal

log = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """A signal ended the training after its state was saved; `signum` is the signal."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum


class SignalRequests:
    """A context manager that turns signals into requests: `save` (SIGUSR1) and `stop` (SIGINT, SIGTERM, SIGHUP).

    While `training` is False there is no state to save, and the signals that stop act at once. So does a second one,
    unless torchrun passes on what a terminal or Slurm has sent to this process as well.
    """

    def __init__(self) -> None:
        self.save = False
        self.stop: int | None = None
        self.training = False
        self._owner = os.getpid()
        self._asked = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalRequests:
        self._previous = {number: signal.getsignal(number) for number in _HANDLED}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals over, also from Lightning, which sets its own handlers when a fit begins."""
        for number in _HANDLED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
                signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            leave_closed_terminal()
        if os.getpid() != self._owner:
            _handle_in_worker(signum)
        elif signum == signal.SIGUSR1:
            self.save = True
        elif self.training and self.stop is None:
            self.stop, self._asked = signum, time.monotonic()
            log.info("\nSaving at the end of this step, then stopping; once more to quit at once.")
        elif self.training and _TORCHRUN in os.environ and time.monotonic() < self._asked + _SECONDS_TO_PASS_ON:
            pass  # the first one once more
        else:  # not KeyboardInterrupt, which Lightning turns into exit code 1
            raise SystemExit(128 + signum)


_TORCHRUN = "TORCHELASTIC_RUN_ID"  # the environment of what it has started
_SECONDS_TO_PASS_ON = 3
_HANDLED = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _handle_in_worker(signum: int) -> None:
    """Data workers inherit the handlers: a Ctrl-C in the terminal reaches them too, and must not end them first."""
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
