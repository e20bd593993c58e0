"""Checkpoints and released weights: reading without execution of code, and atomic writing."""

from ldm.checkpoint.digest import USED_AUTOENCODER, USED_TOWER, encoder_digests, weights_digest
from ldm.checkpoint.formats import converted, is_finite, same_values
from ldm.checkpoint.keys import OPTIONAL_KEYS, SCHEDULE_KEYS, ema_key, is_optional
from ldm.checkpoint.loading import LoadReport, load_file_into, load_into
from ldm.checkpoint.mapped import in_memory
from ldm.checkpoint.reading import OpenCheckpoint, load_checkpoint, load_state_dict, open_checkpoint, weights_of
from ldm.checkpoint.writing import (
    Pending,
    PickledCheckpoint,
    cast,
    check_suffix,
    computed,
    copy_value,
    save_checkpoint,
    save_state_dict,
)

__all__ = [
    "OPTIONAL_KEYS",
    "SCHEDULE_KEYS",
    "USED_AUTOENCODER",
    "USED_TOWER",
    "LoadReport",
    "OpenCheckpoint",
    "Pending",
    "PickledCheckpoint",
    "cast",
    "check_suffix",
    "computed",
    "converted",
    "copy_value",
    "ema_key",
    "encoder_digests",
    "in_memory",
    "is_finite",
    "is_optional",
    "load_checkpoint",
    "load_file_into",
    "load_into",
    "load_state_dict",
    "open_checkpoint",
    "same_values",
    "save_checkpoint",
    "save_state_dict",
    "weights_digest",
    "weights_of",
]
