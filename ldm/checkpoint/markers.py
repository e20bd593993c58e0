"""Marker keys that tell the prediction of a UNet. SDXL files carry them, and other programs read and write them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ldm.checkpoint.keys import EDM_MARKERS, V_PREDICTION, ZERO_SNR
from ldm.util import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")


def marked_parameterization(keys: Collection[str]) -> str | None:
    """Return `v` if `keys` has the marker of v-prediction, else None: files that predict the noise have no marker."""
    return "v" if V_PREDICTION in keys else None


def check_markers(keys: Collection[str], source: str) -> None:
    """Raise `UserError` if `keys`, read from `source`, has a marker of a noise schedule that no model here has."""
    marker = next((key for key in EDM_MARKERS if key in keys), None)
    if marker is not None:
        raise UserError(
            f"{source}: holds {marker}, the marker of an EDM noise schedule (arXiv:2206.00364); no model here has it, "
            "use another release"
        )


def compare_markers(keys: Collection[str], parameterization: str, source: str) -> None:
    """Log a warning if `keys`, read from `source`, tell another prediction than the config's `parameterization`.

    Raises:
        UserError: see `check_markers`.
    """
    check_markers(keys, source)
    if marked_parameterization(keys) not in (None, parameterization):
        log.warning(
            "%s: holds %s, the marker of v-prediction, but the config's parameterization is %s; "
            "set model.params.parameterization to v",
            source,
            V_PREDICTION,
            parameterization,
        )


def with_markers(weights: Mapping[str, T], parameterization: str, zero_snr: bool) -> dict[str, T | Tensor]:
    """Return `weights` with the markers of this prediction, and without markers of another one."""
    predicts_v = parameterization == "v"
    wanted = {V_PREDICTION: predicts_v, ZERO_SNR: predicts_v and zero_snr}
    kept = {key: value for key, value in weights.items() if wanted.get(key, True)}
    return {**kept, **{key: torch.zeros(0) for key, is_so in wanted.items() if is_so and key not in kept}}
