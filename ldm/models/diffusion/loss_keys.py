"""Loss weighting of a model, from its `loss_config` or from the older keys that each set a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.models.diffusion.loss import LogVariance, MinSNR, Unweighted, VariationalBound, instantiate_weighting
from ldm.util import UserError


def weighting_of(
    loss_config: Mapping[str, Any] | None,
    min_snr_gamma: float | None = None,
    learn_logvar: bool = False,
    logvar_init: float = 0.0,
    original_elbo_weight: float = 0.0,
    l_simple_weight: float = 1.0,
) -> Unweighted:
    """Return the weighting of `loss_config`, or of the model's older keys.

    Raises:
        UserError: both are given, or `loss_config` does not name a loss weighting.
    """
    older: dict[str, Any] = {
        "min_snr_gamma": (min_snr_gamma, None),
        "learn_logvar": (learn_logvar, False),
        "logvar_init": (logvar_init, 0.0),
        "original_elbo_weight": (original_elbo_weight, 0.0),
        "l_simple_weight": (l_simple_weight, 1.0),
    }
    given = [key for key, (value, default) in older.items() if value != default]
    if loss_config:
        if given:
            raise UserError(f"{given[0]} and loss_config both set the loss weighting; leave {given[0]} out")
        return instantiate_weighting(loss_config)
    config = None
    if min_snr_gamma is not None:
        config = _config(MinSNR, config, gamma=min_snr_gamma)
    if learn_logvar or logvar_init:
        config = _config(LogVariance, config, init=logvar_init, learn=learn_logvar)
    if original_elbo_weight or l_simple_weight != 1.0:
        config = _config(VariationalBound, config, elbo=original_elbo_weight, simple=l_simple_weight)
    return instantiate_weighting(config)


def _config(target: type[Unweighted], weighting: Mapping[str, Any] | None, **params: Any) -> dict[str, Any]:
    return {"target": f"{target.__module__}.{target.__name__}", "params": {**params, "weighting": weighting}}
