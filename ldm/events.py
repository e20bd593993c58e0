"""Record of a run: its starts, stops, warnings and faults, one JSON object per line. Imports no torch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ldm.files import open_file
from ldm.printable import redacted
from ldm.util import UserError

EVENTS = "events.jsonl"  # in the run folder
START, END, STOP, FAULT, WARNING, FORECAST = "start", "end", "stop", "fault", "warning", "forecast"
_MOST_BYTES = 1 << 24  # newest bytes of the file that a reader takes
_MOST_LETTERS, _MOST_WORDS = 500, 1000  # per text, and per list
_MOST_WARNINGS = 200  # per start, so that a repeated warning does not fill the file
_MOST_BYTES_WITH_WARNINGS = 1 << 23  # size of the file at which it gets no more warnings, over all starts


class EventLog:
    """Writer of a run's events. They wait in memory until the folder has `configs`, which the first step makes.

    A folder whose run does not begin thus stays empty. An error of the file system drops the events.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step: int | None = None  # the newest optimizer step
        self._waiting: list[str] = []
        self._warnings = 0

    def add(self, kind: str, **values: Any) -> None:
        """Add an event of the present time and step. Texts and lists are shortened, and secrets are hidden."""
        content = {"time": datetime.now().isoformat(timespec="seconds"), "kind": kind, "step": self.step}
        self._waiting.append(json.dumps(content | {key: _short(value) for key, value in values.items()}))
        self.flush()

    def flush(self) -> None:
        """Append the waiting events to the file, if the run has begun."""
        if not self._waiting or not (self.folder / "configs").is_dir():
            return
        lines, self._waiting = "".join(f"{line}\n" for line in self._waiting), []
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(self.folder / EVENTS, flags, 0o666), "r+b", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                is_cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a kill or a full disk
                file.write(("\n" * is_cut + lines).encode())
        except OSError:
            logging.getLogger(__name__).debug("%s: %d events are lost", self.folder / EVENTS, lines.count("\n"))

    @contextmanager
    def collecting_warnings(self) -> Iterator[None]:
        """Add the warnings and errors that are logged during the block."""
        handler = _Handler(self._add_warning)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)

    def _add_warning(self, text: str) -> None:
        self._warnings += 1
        if self._warnings <= _MOST_WARNINGS and self._size() < _MOST_BYTES_WITH_WARNINGS:
            self.add(WARNING, text=text)

    def _size(self) -> int:
        try:
            return (self.folder / EVENTS).stat().st_size
        except OSError:
            return 0


def _short(value: Any) -> Any:
    """Return `value` as plain data of limited size."""
    if isinstance(value, dict):
        return {str(key)[:_MOST_LETTERS]: _short(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(part) for part in value[:_MOST_WORDS]]
    return value if value is None or isinstance(value, (bool, int, float)) else redacted(str(value))[:_MOST_LETTERS]


class _Handler(logging.Handler):
    def __init__(self, add: Any) -> None:
        super().__init__(logging.WARNING)
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._add(" ".join(record.getMessage().split()))
        except Exception:  # as in other handlers, a message that cannot be formatted ends nothing
            self.handleError(record)


def read_events(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the events of the run in `folder`, oldest first, and the number of damaged lines.

    Of a file above the size limit, the newest events are read.

    Raises:
        UserError: the file is not a regular file.
    """
    try:
        with open_file(folder / EVENTS) as file:
            start = max(0, os.fstat(file.fileno()).st_size - _MOST_BYTES)
            file.seek(start)
            data = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{folder / EVENTS}: cannot be read: {error.strerror or error}") from error
    if start:
        data = data.partition(b"\n")[2]  # without the rest of a line
    events, damaged = [], 0
    for line in filter(str.strip, data.decode(errors="replace").split("\n")):
        event = _parsed(line)
        if event is None:
            damaged += 1
        else:
            events.append(event)
    return events, damaged


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("kind"), str) and isinstance(event.get("time"), str)
    step = event.get("step") if is_event else None
    return event if is_event and (step is None or type(step) is int) else None
