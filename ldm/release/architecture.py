"""Comparison of the weights of a training with those of the release that it started from, by key, shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ldm.checkpoint import SCHEDULE_KEYS, is_optional
from ldm.checkpoint.causes import likely_cause
from ldm.checkpoint.formats import can_hold
from ldm.checkpoint.keys import EMA, FIRST_STAGE, MODEL, TEXT_ENCODERS, has_part
from ldm.checkpoint.names import is_carried
from ldm.util import UserError

Weights = Mapping[str, torch.Tensor]

# Parts that a training may lack. They are then kept from the release.
OPTIONAL_PARTS = (FIRST_STAGE, *TEXT_ENCODERS)


def check_same_architecture(training: Weights, release: Weights) -> None:
    """Raise `UserError` unless both have weights of the same keys and shapes, and of dtypes that agree.

    The training may lack the autoencoder and the text encoders, or all but the autoencoder. Either may lack optional
    keys.
    """
    cause = "are they of one model?"
    for key, value in training.items():
        if key in release and key not in SCHEDULE_KEYS and value.shape != release[key].shape:
            shapes = f"{tuple(value.shape)} in the training, {tuple(release[key].shape)} in the release"
            raise UserError(f"{key} has shape {shapes}; {likely_cause(release, training, cause)}")
        if key in release and key not in SCHEDULE_KEYS and not can_hold(value.dtype, release[key].dtype):
            raise UserError(
                f"{key} is {value.dtype} in the training, {release[key].dtype} in the release; dequantise the release "
                "and save it as floating-point numbers"
            )
        if key not in release and not (is_optional(key) or is_carried(key)):
            raise UserError(
                f"the release lacks {key}, which the training has; {likely_cause(release, training, cause)}"
            )
    may_lack = (MODEL, *OPTIONAL_PARTS) if is_of_autoencoder(training) else OPTIONAL_PARTS
    parts = [part for part in may_lack if not has_part(training, part)]
    for key in release:
        if key not in training and not is_optional(key) and not key.startswith(tuple(parts)):
            raise UserError(
                f"the training lacks {key}, which the release has; {likely_cause(release, training, cause)}"
            )


def is_of_autoencoder(training: Weights) -> bool:
    """Return True for the weights of a training of an autoencoder alone."""
    return has_part(training, FIRST_STAGE) and not (has_part(training, MODEL) or has_part(training, EMA))
