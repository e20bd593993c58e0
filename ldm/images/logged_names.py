"""Names of the image files that a training logs. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

PREVIEWS = "previews"  # folder of a run with images of fixed prompts, and their prefix in loggers
_NAME = re.compile(r"(.+)_gs-(\d{1,12})_e-\d+_b-\d+\.png")


class LoggedName(NamedTuple):
    """Entry of `log_images` and optimizer step of a logged image."""

    key: str
    step: int


def logged_name(key: str, step: int, epoch: int, batch: int) -> str:
    """Return the file name of the entry `key` of `log_images`."""
    return f"{key}_gs-{step:06}_e-{epoch:06}_b-{batch:06}.png".replace("/", "_")


def parse_logged_name(name: str) -> LoggedName | None:
    """Return the entry and the step of the file `name`; None if it is not of a logged image."""
    found = _NAME.fullmatch(name)
    return LoggedName(found[1], int(found[2])) if found else None


def spread_evenly(entries: Sequence, most: int) -> list:
    """Return at most `most` of `entries`, evenly spaced, with the last and, if there is room, the first."""
    if len(entries) <= most:
        return list(entries)
    if most <= 1:
        return list(entries[-1:]) if most else []
    return [entries[round(number * (len(entries) - 1) / (most - 1))] for number in range(most)]
