"""Noise schedule and prediction in the scheduler's config of a diffusers folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
# The schedule of all families: linear in √β. An absent entry has diffusers' default, which `_DEFAULTS` holds.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}


def prediction_of(config: Mapping[str, Any], path: Path) -> tuple[str | None, bool]:
    """Return what the UNet predicts, `eps`, `v` or None if unknown, and whether the schedule has zero terminal SNR."""
    if not config:
        return None, False
    name = config.get("prediction_type", "epsilon")
    refuse_if(
        not isinstance(name, str) or name not in PREDICTIONS,
        f"{path}: prediction_type {name!r:.40}: this program takes {' or '.join(PREDICTIONS)}",
    )
    return PREDICTIONS[name], config.get("rescale_betas_zero_snr") is True


def check_schedule(config: Mapping[str, Any], path: Path) -> None:
    """Warn if the schedule in `config`, read from `path`, is not that of the families.

    Raises:
        UserError: it is of another kind, which no model here has.
    """
    kind = str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")):
        raise UserError(f"{path}: is of a {kind:.60}, another kind of noise schedule, which no model here has")
    others = [key for key, value in SCHEDULE.items() if config.get(key, _DEFAULTS[key]) != value]
    if config.get("trained_betas") is not None:
        others = ["trained_betas"]
    if others:
        log.warning(
            "%s: the noise schedule (%s) differs from the config, whose schedule is used; check timesteps, "
            "linear_start and linear_end of the config",
            path, ", ".join(f"{key} {config.get(key, _DEFAULTS.get(key))!s:.40}" for key in others),
        )  # fmt: skip
