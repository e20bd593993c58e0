"""A program in a terminal of its own, which can be closed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import threading
from pathlib import Path

from tests.waiting import LIMIT


class Terminal:
    """Pseudo-terminal whose session is a Python program; `close` hangs it up, as closing the window does."""

    def __init__(self, *line: object, cwd: Path) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, line)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.said = b""
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        """Read what the program prints: it would wait for room otherwise."""
        while not self._closing.is_set():
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self.said += os.read(self._master, 1 << 16)
                except OSError:  # the program has ended
                    return

    def close(self) -> int:
        """Close the terminal and return the exit code of the program."""
        self._closing.set()
        self._reader.join()
        os.close(self._master)
        try:
            return self.process.wait(LIMIT)
        finally:
            self.process.kill()
