"""State of the studio that all parts of the page share. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.cli.paths import LOGS
from ldm.files import atomic_write, read_at_most
from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.job_store import JobStore
from ldm.studio.thumbnails import Thumbnails
from ldm.util import refuse_if

_SETTINGS = "settings.json"  # values of the fields of the page
_MOST_BYTES = 1 << 20


@dataclass
class Studio:
    """Folders that may be read, the folder `work` for what the studio writes, and the first values of the fields."""

    allowed: AllowedFolders
    work: Path
    defaults: Mapping[str, Any]
    card: str = ""  # name of the detected card
    jobs: JobStore = field(init=False)
    thumbnails: Thumbnails = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = JobStore(self.work / "jobs")
        self.thumbnails = Thumbnails(self.work / "thumbnails", self.allowed)

    def run_folder(self, run: str | None) -> Path:
        """Return the folder of a run that was chosen in a list.

        Raises:
            UserError: none is chosen, or the run is gone.
        """
        refuse_if(not run, "no run is chosen; choose one in the list")
        return self.allowed.check_folder(LOGS / run, "run")

    def saved(self) -> dict[str, Any]:
        """Return the values that the fields had when a command was last started, over the defaults."""
        found: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            content = json.loads(read_at_most(self.work / _SETTINGS, _MOST_BYTES))
            found = content if isinstance(content, dict) else {}
        alike = {key: value for key, value in found.items() if _kind(value) is _kind(self.defaults.get(key))}
        return {**self.defaults, **alike}

    def save(self, values: Mapping[str, Any]) -> None:
        """Keep `values` of fields for a page that is opened later."""
        with atomic_write(self.work / _SETTINGS) as temporary:
            temporary.write_text(json.dumps({**self.saved(), **values}, indent=1), encoding="utf-8")


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)
