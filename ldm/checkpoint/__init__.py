"""Checkpoints and released weights: reading without running anything, writing whole or not at all."""

from ldm.checkpoint.digest import encoder_digests, weights_digest
from ldm.checkpoint.loading import OPTIONAL_KEYS, SCHEDULE_KEYS, LoadReport, is_optional, load_file_into, load_into
from ldm.checkpoint.reading import OpenCheckpoint, load_checkpoint, load_state_dict, open_checkpoint, weights_of
from ldm.checkpoint.writing import Pending, cast, check_suffix, save_checkpoint, save_state_dict

__all__ = [
    "OPTIONAL_KEYS",
    "SCHEDULE_KEYS",
    "LoadReport",
    "OpenCheckpoint",
    "Pending",
    "cast",
    "check_suffix",
    "encoder_digests",
    "is_optional",
    "load_checkpoint",
    "load_file_into",
    "load_into",
    "load_state_dict",
    "open_checkpoint",
    "save_checkpoint",
    "save_state_dict",
    "weights_digest",
    "weights_of",
]
