"""Loss weightings, which combine the errors of a batch into one loss.

B: batch. T: timesteps of the schedule. error (B,): mean error of each sample. t (B,): timesteps, counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.schedule import min_snr_weights
from ldm.util import UserError, instantiate_from_config

# A factor and values (B,). The term is factor · mean(values).
Term = tuple[float, Tensor]
# Mean of values (B,) over samples of the batch.
Mean = Callable[[Tensor], Tensor]


class Weighted(Protocol):
    """Parts of a model that weightings read, or register in `attach`."""

    parameterization: str
    num_timesteps: int
    alphas_cumprod: Tensor  # (T,)
    lvlb_weights: Tensor  # (T,)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None: ...

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None: ...


class BatchMean:
    """Averaging of losses with equal weight for all samples. Subclasses weight some samples differently."""

    def timesteps_and_noise(self, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the timesteps (B,) and the noise (B, …) of the model's input."""
        return t, noise

    def target(self, target: Tensor) -> Tensor:
        """Return the targets (B, …) of the predictions, given the usual ones."""
        return target

    def training_mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (B,) over the training samples."""
        return values.mean()

    def loss_mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (B,) for the loss."""
        return values.mean()

    def logged(self, error: Tensor, split: str) -> dict[str, Tensor]:
        """Return further values to log, from the errors (B,)."""
        return {}


EQUAL = BatchMean()


class Unweighted:
    """Mean error, the simple loss of arXiv:2006.11239, eq. 14. Base of all weightings.

    A subclass may wrap another weighting and change its terms.
    """

    def attach(self, model: Weighted) -> None:
        """Register on `model` the buffers and parameters that the weighting needs."""

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        """Return the terms whose sum is the loss."""
        return [(1.0, error)]

    def logged(self, model: Weighted, error: Tensor, t: Tensor, mean: Mean, split: str) -> dict[str, Tensor]:
        """Return further values to log. Their names start with `split`."""
        return {}

    def loss(self, model: Weighted, error: Tensor, t: Tensor, mean: Mean) -> Tensor:
        """Return the sum of the terms, each averaged by `mean`."""
        return sum(factor * mean(values) for factor, values in self.terms(model, error, t))


class _Wrapper(Unweighted):
    """Base of weightings that change the terms of another weighting, by default `Unweighted`."""

    def __init__(self, weighting: Mapping[str, Any] | None = None) -> None:
        self.inner = _instantiate(weighting)

    def attach(self, model: Weighted) -> None:
        self.inner.attach(model)

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        return self.inner.terms(model, error, t)

    def logged(self, model: Weighted, error: Tensor, t: Tensor, mean: Mean, split: str) -> dict[str, Tensor]:
        return self.inner.logged(model, error, t, mean, split)


class MinSNR(_Wrapper):
    """Weighting by `min_snr_weights`, which reduces the weight of low noise (arXiv:2303.09556).

    Args:
        gamma: upper bound of the signal-to-noise ratio. A usual value is 5.
        weighting: `target` and `params` of the weighting to change.

    Raises:
        UserError: `gamma` is not above 0.
    """

    def __init__(self, gamma: float = 5.0, weighting: Mapping[str, Any] | None = None) -> None:
        if not gamma > 0:
            raise UserError(f"min_snr_gamma {gamma!r}: give a number above 0, or leave it out")
        super().__init__(weighting)
        self.gamma = gamma

    def attach(self, model: Weighted) -> None:
        super().attach(model)
        weights = min_snr_weights(model.alphas_cumprod, self.gamma, model.parameterization)
        model.register_buffer("snr_weights", weights, persistent=False)

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        return [(factor, model.snr_weights[t] * values) for factor, values in super().terms(model, error, t)]


class LogVariance(_Wrapper):
    """Weighting by a log-variance s per timestep: error / exp(s) + s, a Gaussian log-likelihood up to constants.

    Args:
        init: initial s.
        learn: train s. The checkpoint stores it as `logvar`.
        weighting: `target` and `params` of the weighting to change.
    """

    def __init__(self, init: float = 0.0, learn: bool = True, weighting: Mapping[str, Any] | None = None) -> None:
        super().__init__(weighting)
        self.init = init
        self.learn = learn

    def attach(self, model: Weighted) -> None:
        super().attach(model)
        logvar = torch.full((model.num_timesteps,), float(self.init))
        if self.learn:
            model.register_parameter("logvar", nn.Parameter(logvar))
        else:
            model.register_buffer("logvar", logvar, persistent=False)

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        logvar = model.logvar[t]
        return [(factor, values / logvar.exp() + logvar) for factor, values in super().terms(model, error, t)]

    def logged(self, model: Weighted, error: Tensor, t: Tensor, mean: Mean, split: str) -> dict[str, Tensor]:
        inner = super().logged(model, error, t, mean, split)
        if not self.learn:
            return inner
        return {**inner, f"{split}/loss_gamma": self.loss(model, error, t, mean), "logvar": model.logvar.mean()}


class VariationalBound(_Wrapper):
    """Sum of a loss and the variational bound: `simple` · loss + `elbo` · bound (arXiv:2006.11239, eq. 12, 14).

    Args:
        elbo: weight of the bound.
        simple: weight of the loss of `weighting`.
        weighting: `target` and `params` of the weighting of the loss.
    """

    def __init__(self, elbo: float = 0.0, simple: float = 1.0, weighting: Mapping[str, Any] | None = None) -> None:
        super().__init__(weighting)
        self.elbo = elbo
        self.simple = simple

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        simple = [(self.simple * factor, values) for factor, values in super().terms(model, error, t)]
        return [*simple, (self.elbo, model.lvlb_weights[t] * error)]


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
    if loss_config is not None:
        if given:
            raise UserError(f"{given[0]} and loss_config both set the loss weighting; leave {given[0]} out")
        return _instantiate(loss_config)
    config = None
    if min_snr_gamma is not None:
        config = _config(MinSNR, config, gamma=min_snr_gamma)
    if learn_logvar or logvar_init:
        config = _config(LogVariance, config, init=logvar_init, learn=learn_logvar)
    if original_elbo_weight or l_simple_weight != 1.0:
        config = _config(VariationalBound, config, elbo=original_elbo_weight, simple=l_simple_weight)
    return _instantiate(config)


def _config(target: type[Unweighted], weighting: Mapping[str, Any] | None, **params: Any) -> dict[str, Any]:
    return {"target": f"{__name__}.{target.__name__}", "params": {**params, "weighting": weighting}}


def _instantiate(config: Mapping[str, Any] | None) -> Unweighted:
    if config is None:
        return Unweighted()
    weighting = instantiate_from_config(config)
    if not isinstance(weighting, Unweighted):
        names = ", ".join(kind.__name__ for kind in (Unweighted, MinSNR, LogVariance, VariationalBound))
        raise UserError(f"loss_config: {config['target']} is not a loss weighting; {__name__} has {names}")
    return weighting
