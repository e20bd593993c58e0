"""Autoencoders in the files of any program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from ldm.checkpoint.causes import diffusers_layout
from ldm.checkpoint.diffusers_folder import translated
from ldm.checkpoint.diffusers_keys import VAE_PART
from ldm.checkpoint.keys import FIRST_STAGE, has_part

_ENDS = ("encoder.conv_in.weight", "decoder.conv_out.weight")  # of an autoencoder's encoder and decoder


def is_autoencoder(keys: Collection[str]) -> bool:
    """Return True if `keys` are those of an autoencoder alone."""
    return all(end in keys for end in _ENDS)


def autoencoder_of(weights: Mapping[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """Return the autoencoder among the `weights` of the file at `path`, with the keys of an autoencoder alone.

    The file may be a release, an autoencoder alone, or either as a folder of diffusers. Weights without an autoencoder
    are returned as they are.

    Raises:
        UserError: the weights have names of diffusers, and hold what no autoencoder has.
    """
    if diffusers_layout(weights) and not has_part(weights, FIRST_STAGE):
        weights = translated(VAE_PART, weights, Path(path))
    if not has_part(weights, FIRST_STAGE):
        return dict(weights)
    return {key.removeprefix(FIRST_STAGE): value for key, value in weights.items() if key.startswith(FIRST_STAGE)}
