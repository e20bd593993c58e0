"""Loss weightings, which combine the errors of a batch into one loss.

B: batch. T: timesteps of the schedule. error (B,): mean error of each sample. t (B,): timesteps, counted from 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.batch import Batch
from ldm.models.diffusion.batch_mean import BatchMean, Mean
from ldm.models.diffusion.weighted_model import Weighted
from ldm.modules.diffusionmodules.schedule import extract_into_tensor, snr_weights
from ldm.util import UserError, check_choice, check_number, instantiate_from_config, refuse_if

log = logging.getLogger(__name__)

# A factor and values (B,). The term is factor · mean(values).
Term = tuple[float, Tensor]


class Unweighted:
    """Mean error, the simple loss of arXiv:2006.11239, eq. 14. Base of all weightings.

    A subclass may wrap another weighting and change its terms.
    """

    entries: tuple[str, ...] = ()  # batch entries that the weighting reads
    reads_predictions = False  # whether it reads a teacher's predictions of the training set

    def attach(self, model: Weighted) -> None:
        """Register on `model` the buffers and parameters that the weighting needs."""

    def samples(self, batch: Batch, samples: BatchMean, training: bool = True) -> BatchMean:
        """Return the averaging of the losses of a batch of the training or of validation, from that of the model."""
        return samples

    def error(self, model: Weighted, difference: Tensor, t: Tensor) -> Tensor:
        """Return the error of each element, from target − output (B, …): absolute for `l1`, and squared for `l2`."""
        return difference.abs() if model.loss_type == "l1" else difference.square()

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        """Return the terms whose sum is the loss."""
        return [(1.0, error)]

    def logged(self, model: Weighted, error: Tensor, t: Tensor, mean: Mean, split: str) -> dict[str, Tensor]:
        """Return further values to log. Their names start with `split`."""
        return {}

    def loss(self, model: Weighted, error: Tensor, t: Tensor, mean: Mean) -> Tensor:
        """Return the sum of the terms, each averaged by `mean`."""
        return sum(factor * mean(values) for factor, values in self.terms(model, error, t))

    def of_samples(self, model: Weighted, error: Tensor, t: Tensor) -> Tensor:
        """Return the loss of each sample, (B,)."""
        return self.loss(model, error, t, lambda values: values)


class Wrapper(Unweighted):
    """Base of weightings that change the terms of another weighting, by default `Unweighted`.

    Raises:
        UserError: the other weighting reads predictions, which are of the plain error.
    """

    def __init__(self, weighting: Mapping[str, Any] | None = None) -> None:
        self.inner = instantiate_weighting(weighting)
        refuse_if(
            self.inner.reads_predictions,
            f"weighting: {type(self.inner).__name__} weights no other loss; name it as loss_config",
        )

    @property
    def entries(self) -> tuple[str, ...]:
        return self.inner.entries

    def attach(self, model: Weighted) -> None:
        self.inner.attach(model)

    def samples(self, batch: Batch, samples: BatchMean, training: bool = True) -> BatchMean:
        return self.inner.samples(batch, samples, training)

    def error(self, model: Weighted, difference: Tensor, t: Tensor) -> Tensor:
        return self.inner.error(model, difference, t)

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        return self.inner.terms(model, error, t)

    def logged(self, model: Weighted, error: Tensor, t: Tensor, mean: Mean, split: str) -> dict[str, Tensor]:
        return self.inner.logged(model, error, t, mean, split)


class _SNRWeighting(Wrapper):
    """Base of weightings by the signal-to-noise ratio, SNR = ᾱ / (1 − ᾱ)."""

    def attach(self, model: Weighted) -> None:
        super().attach(model)
        name = type(self).__name__
        refuse_if(
            hasattr(model, "snr_weights"), f"loss_config: {name} wraps another weighting by SNR; choose one of them"
        )
        weights = snr_weights(model.alphas_cumprod, self.of_x0, model.parameterization)
        refuse_if(
            not weights.isfinite().all(),
            f"loss_config: {name} is infinite for eps at zero terminal SNR; set parameterization: v",
        )
        if weights[-1] == 0:
            log.warning(
                "loss_config: %s gives the last timestep, which is pure noise, weight 0: it is not trained", name
            )
        model.register_buffer("snr_weights", weights, persistent=False)

    def of_x0(self, snr: Tensor) -> Tensor:
        """Return the weights of the squared error of x₀, for SNR (T,) in float64."""
        raise NotImplementedError

    def terms(self, model: Weighted, error: Tensor, t: Tensor) -> list[Term]:
        return [(factor, model.snr_weights[t] * values) for factor, values in super().terms(model, error, t)]


class MinSNR(_SNRWeighting):
    """Weight min(SNR, γ) of the error of x₀, which reduces the weight of low noise (arXiv:2303.09556).

    Args:
        gamma: γ, the upper bound of the signal-to-noise ratio. A usual value is 5.
        weighting: `target` and `params` of the weighting to change.

    Raises:
        UserError: `gamma` is not above 0.
    """

    def __init__(self, gamma: float = 5.0, weighting: Mapping[str, Any] | None = None) -> None:
        refuse_if(not gamma > 0, f"min_snr_gamma {gamma!r}: give a number above 0, or leave it out")
        super().__init__(weighting)
        self.gamma = gamma

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma)


class SoftMinSNR(MinSNR):
    """Weight SNR · γ / (SNR + γ) of the error of x₀, a smooth minimum of SNR and γ (arXiv:2401.11605)."""

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr * self.gamma / (snr + self.gamma)


class Debiased(_SNRWeighting):
    """Weight √SNR of the error of x₀, which is 1 / √SNR of the error of ε (arXiv:2310.08442)."""

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr.sqrt()


class P2(_SNRWeighting):
    """Weight 1 / (k + SNR)^γ of the error of ε, which reduces the weight of low noise (arXiv:2204.00227).

    Args:
        gamma, k: γ and k. The paper has γ from 0.5 to 1, and k = 1.
        weighting: `target` and `params` of the weighting to change.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0, weighting: Mapping[str, Any] | None = None) -> None:
        check_number("gamma", gamma, least=0, whole=False)
        check_number("k", k, above=0, whole=False)
        super().__init__(weighting)
        self.gamma, self.k = gamma, k

    def of_x0(self, snr: Tensor) -> Tensor:
        return snr / (self.k + snr) ** self.gamma


class Huber(Wrapper):
    """Pseudo-Huber error 2c (√(d² + c²) − c) of a difference d (arXiv:2403.16728).

    It is about d² for small d, and about 2c |d| for large d, so that outliers count less.

    Args:
        c: c, or its lowest value.
        schedule: `constant`; `exponential`, from 1 at the first timestep to c at the last; or `snr`,
            c + (1 − c) / (1 + σ)² with σ = √((1 − ᾱ) / ᾱ).
        weighting: `target` and `params` of the weighting of the errors.

    Raises:
        UserError: `c` is not above 0 and at most 1, the schedule is unknown, or `loss_type` is `l1`.
    """

    def __init__(self, c: float = 0.1, schedule: str = "snr", weighting: Mapping[str, Any] | None = None) -> None:
        check_number("c", c, above=0, most=1, whole=False)
        check_choice("schedule", schedule, ("constant", "exponential", "snr"))
        super().__init__(weighting)
        self.c, self.schedule = c, schedule

    def attach(self, model: Weighted) -> None:
        super().attach(model)
        refuse_if(
            model.loss_type != "l2",
            f"loss_type {model.loss_type} and loss_config: Huber both choose the error; leave one out",
        )
        t = torch.arange(model.num_timesteps)
        snr = model.alphas_cumprod.double() / (1 - model.alphas_cumprod.double())
        values = {
            "constant": torch.full_like(snr, self.c),
            "exponential": self.c ** (t / max(1, model.num_timesteps - 1)).double(),
            "snr": self.c + (1 - self.c) / (1 + snr.rsqrt()) ** 2,
        }[self.schedule]
        model.register_buffer("huber_c", values.float(), persistent=False)

    def error(self, model: Weighted, difference: Tensor, t: Tensor) -> Tensor:
        c = extract_into_tensor(model.huber_c, t, difference.shape)
        return 2 * c * ((difference.square() + c.square()).sqrt() - c)


class LogVariance(Wrapper):
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


class VariationalBound(Wrapper):
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


def instantiate_weighting(config: Mapping[str, Any] | None) -> Unweighted:
    """Return the weighting of `config`, `target` and `params`, or `Unweighted` without one.

    Raises:
        UserError: the target is not a loss weighting.
    """
    if not config:
        return Unweighted()
    weighting = instantiate_from_config(config)
    if not isinstance(weighting, Unweighted):
        names = ", ".join(name for name, value in globals().items() if _is_choice(name, value))
        others = "masked_loss.Masked and consistency.DirectConsistency are beside it"
        raise UserError(f"loss_config: {config['target']} is not a loss weighting; {__name__} has {names}; {others}")
    return weighting


def _is_choice(name: str, value: Any) -> bool:
    """Return True for a weighting of this module that a config can name."""
    is_weighting = isinstance(value, type) and issubclass(value, Unweighted)
    return is_weighting and value is not Wrapper and not name.startswith("_")
