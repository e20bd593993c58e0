"""Marker keys that tell the prediction of a UNet. SDXL files carry them, and other programs read and write them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ldm.checkpoint.keys import EDM_MARKERS, V_PREDICTION, ZERO_SNR
from ldm.util import refuse_if

log = logging.getLogger(__name__)

T = TypeVar("T")
# Entry of a file's metadata (ModelSpec 1.0), and its texts by the terms of the config.
PREDICTION_TYPE = "modelspec.prediction_type"
STATED = {"eps": "epsilon", "v": "v"}


def marked_parameterization(keys: Collection[str], metadata: Mapping[str, str] | None = None) -> str | None:
    """Return what the UNet of a file predicts, or None if neither its `keys` nor its `metadata` tell.

    The marker of v-prediction takes precedence. Files that predict the noise have no marker.
    """
    if V_PREDICTION in keys:
        return "v"
    text = (metadata or {}).get(PREDICTION_TYPE)
    return next((name for name, stated in STATED.items() if stated == text), None)


def check_markers(keys: Collection[str], source: str) -> None:
    """Raise `UserError` if `keys`, read from `source`, has a marker of a noise schedule that no model here has."""
    marker = next((key for key in EDM_MARKERS if key in keys), None)
    refuse_if(
        marker is not None,
        f"{source}: holds {marker}, the marker of an EDM noise schedule (arXiv:2206.00364); no model here has it, "
        "use another release",
    )


def compare_markers(
    keys: Collection[str], parameterization: str, source: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Log a warning if a file tells another prediction than the config's `parameterization`.

    `keys` and `metadata` are those of the file `source`.

    Raises:
        UserError: see `check_markers`.
    """
    check_markers(keys, source)
    marked = marked_parameterization(keys, metadata)
    if marked in (None, parameterization):
        return
    where = (
        f"holds {V_PREDICTION}, the marker of v-prediction"
        if V_PREDICTION in keys
        else f"its {PREDICTION_TYPE} is {STATED[marked]}"
    )
    log.warning(
        "%s: %s, but the config's parameterization is %s; set model.params.parameterization to %s",
        source, where, parameterization, marked,
    )  # fmt: skip


def with_markers(weights: Mapping[str, T], parameterization: str, zero_snr: bool) -> dict[str, T | Tensor]:
    """Return `weights` with the markers of this prediction, and without markers of another one."""
    predicts_v = parameterization == "v"
    wanted = {V_PREDICTION: predicts_v, ZERO_SNR: predicts_v and zero_snr}
    kept = {key: value for key, value in weights.items() if wanted.get(key, True)}
    return {**kept, **{key: torch.zeros(0) for key, is_so in wanted.items() if is_so and key not in kept}}
