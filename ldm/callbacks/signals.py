"""Requests of SIGUSR1, Ctrl-C, SIGTERM and SIGHUP, which training serves at its next step. Imports no torch."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType
from typing import Any

from ldm.distributed.ranks import LAUNCHERS, current_launcher
from ldm.files import leave_closed_terminal

log = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """Exception that ends training after its state was saved, because of the signal `signum`."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum


class SignalRequests:
    """Context manager that turns signals into requests: `save` (SIGUSR1) and `stop` (SIGINT, SIGTERM, SIGHUP).

    While `training` is False, there is no state to save, and a signal to stop acts at once. A second signal to stop
    also acts at once, unless it is the same signal forwarded by torchrun.
    """

    def __init__(self) -> None:
        self.save = False
        self.stop: int | None = None
        self.training = False
        self._owner = os.getpid()
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalRequests:
        self._previous = {number: signal.getsignal(number) for number in _HANDLED}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers; call it again after Lightning sets its own when a fit begins."""
        for number in _HANDLED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # set by nohup
                signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            leave_closed_terminal()
        if os.getpid() != self._owner:
            _handle_in_worker(signum)
        elif signum == signal.SIGUSR1:
            self.save = True
        elif self.training and self.stop is None:
            self.stop, self._requested_at = signum, time.monotonic()
            log.info("\nTraining stops after this step and saves its state. Send the signal again to quit at once.")
        elif self.training and current_launcher() == LAUNCHERS["torchrun"] and self._is_forwarded():
            pass
        else:  # KeyboardInterrupt would become exit code 1 in Lightning
            raise SystemExit(128 + signum)

    def _is_forwarded(self) -> bool:
        """Return True if the launcher may still be forwarding the first signal."""
        return time.monotonic() < self._requested_at + _SECONDS_TO_FORWARD


_SECONDS_TO_FORWARD = 3
_HANDLED = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _handle_in_worker(signum: int) -> None:
    """End a data worker on SIGTERM, and ignore other signals: a worker inherits the handlers and must not end first."""
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
