"""The sample format: members of a sample, their types, and the batch entries that the data give and the models read."""

from __future__ import annotations

from ldm.shards import npy

DRAW = "draw"  # B strings: each names the random numbers which a training step draws for its sample
IS_PRIOR = "is_prior"  # bool (B,): samples that are there to be remembered
# What a frozen model was asked and said of a prior's sample: a timestep, an integer from 0, (B,); the noise
# (B, C, h, w); and the output (B, C, h, w), whatever it predicts. A stored sample has K of each.
TIMESTEPS, NOISE, PREDICTION = TEACHER_KEYS = ("t", "noise", "prediction")

TEXT_KEYS = ("txt", "json")  # members that are not arrays
CAPTION, ORIGIN = TEXT_KEYS


def member_extension(key: str) -> str:
    """How the member that holds `key` ends: `f8` is in `<sample>.f8.npy`, `txt` in `<sample>.txt`."""
    return key if key in TEXT_KEYS else f"{key}.npy"


def number_types(key: str) -> tuple[str, ...]:
    """The numpy types that the array under `key` may have."""
    return npy.INTEGERS if key == TIMESTEPS else npy.FLOATS
