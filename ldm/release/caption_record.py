"""Record, in the metadata of a release, of the settings that its training read captions with.

Sampling takes them from there, because a release makes other images with other settings.
"""

from __future__ import annotations

import logging
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
    state = (training.get("callbacks") or {}).get(_STATE)
    if not isinstance(state, Mapping) or not all(type(state.get(name)) is int for name in KEYS):
        return None
    return {KEYS[name]: str(value) for name, value in CaptionSettings.from_entries(state).entries().items()}


def apply_record(stage: nn.Module | None, metadata: Mapping[str, str], path: str | Path) -> None:
    """Give the cond stage of a release its settings in `metadata`. Settings of the config take precedence.

    Raises:
        UserError: a setting is no number, or none that the cond stage can have.
    """
    found = {name: metadata[key] for name, key in KEYS.items() if key in metadata}
    if stage is None or not found:
        return
    wrong = next((name for name, text in found.items() if not (text.isascii() and text.isdigit())), None)
    if wrong is not None:
        raise UserError(f"{path}: {KEYS[wrong]} in its metadata is {found[wrong]!r:.40}, not a whole number")
    own, recorded = caption_settings(stage), CaptionSettings(**{name: int(text) for name, text in found.items()})
    if own != DEFAULT:
        if own != recorded:
            log.warning("%s: was trained with %s, but the config has %s, which is used", path, recorded, own)
        return
    try:
        set_caption_settings(stage, *recorded)
    except UserError as error:
        raise UserError(f"{path}: was trained with {recorded} by its metadata; {error}") from error
    log.info("%s: reads captions with %s, as in its training", path, recorded)
