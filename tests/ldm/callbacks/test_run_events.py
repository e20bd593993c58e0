from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldm.callbacks.run_events import RunEvents
from ldm.checkpoint.keys import RELEASE
from ldm.events import EventLog

NOTE = {"name": "models/r.ckpt", "sha256": "ab"}


@pytest.mark.parametrize(
    ("note", "kept"),
    [
        (NOTE, NOTE),
        ({**NOTE, "more": [1]}, NOTE),
        ({(1, 2): 3}, None),
        ({**NOTE, "name": "x" * 5000}, None),
        ({**NOTE, "sha256": 10**5000}, None),
        ("x", None),
        (None, None),
    ],
)
def test_run_events_carries_only_a_well_formed_note_of_the_release(tmp_path: Path, note: Any, kept: Any) -> None:
    events = RunEvents(EventLog(tmp_path), None, 1)
    trainer, saved = SimpleNamespace(), {}
    events.on_load_checkpoint(trainer, None, {RELEASE: note})
    events.on_save_checkpoint(trainer, None, saved)
    assert saved.get(RELEASE) == kept
