"""Record, in the metadata of a release, of the settings that its training read captions with.

Sampling takes them from there, because a release makes other images with other settings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm.modules.encoders.caption_settings import DEFAULT, CaptionSettings, caption_settings, set_caption_settings
from ldm.util import UserError

log = logging.getLogger(__name__)

_PREFIX = "ldm."
KEYS = {name: _PREFIX + name for name in CaptionSettings._fields}  # of the metadata
_STATE = "SameEncoders"  # callback whose state in a training checkpoint has the settings


def record_of(training: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the metadata for the settings that a training checkpoint notes, without defaults; None if it has none."""
    callbacks = training.get("callbacks")
    state = callbacks.get(_STATE) if isinstance(callbacks, Mapping) else None
    if not isinstance(state, Mapping) or not all(type(state.get(name)) is int for name in KEYS):
        return None
    return {KEYS[name]: str(value) for name, value in CaptionSettings.from_entries(state).entries().items()}


def apply_record(stage: nn.Module | None, metadata: Mapping[str, str], path: str | Path) -> None:
    """Give the cond stage of a release its settings in `metadata`. Settings of the config take precedence.

    Settings that the cond stage cannot have are ignored, with a warning.
    """
    found = {name: metadata[key] for name, key in KEYS.items() if key in metadata}
    if stage is None or not found:
        return
    wrong = next((name for name, text in found.items() if not re.fullmatch("[1-9][0-9]{0,3}", text)), None)
    if wrong is not None:
        log.warning("%s: %s in its metadata is ignored: %.40r is no such number", path, KEYS[wrong], found[wrong])
        return
    own, recorded = caption_settings(stage), CaptionSettings(**{name: int(text) for name, text in found.items()})
    if own != DEFAULT:
        if own != recorded:
            log.warning("%s: was trained with %s, but the config has %s, which is used", path, recorded, own)
        return
    try:
        set_caption_settings(stage, *recorded)
    except UserError as error:
        log.warning("%s: %s in its metadata is ignored: %s", path, recorded, error)
        return
    log.info("%s: reads captions with %s, as in its training", path, recorded)
