"""Checkpoints and released weights: reading without running anything, writing whole or not at all."""

from ldm.checkpoint.loading import OPTIONAL_KEYS, LoadReport, load_into
from ldm.checkpoint.reading import OpenCheckpoint, load_checkpoint, load_state_dict, open_checkpoint, weights_of
from ldm.checkpoint.writing import save_checkpoint, save_state_dict

__all__ = [
    "OPTIONAL_KEYS",
    "LoadReport",
    "OpenCheckpoint",
    "load_checkpoint",
    "load_into",
    "load_state_dict",
    "open_checkpoint",
    "save_checkpoint",
    "save_state_dict",
    "weights_of",
]
