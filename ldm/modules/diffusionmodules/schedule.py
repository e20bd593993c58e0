"""Noise schedules and the Gaussian diffusion that follows from them.

Equation numbers are those of DDPM (arXiv:2006.11239) unless a paper is named. ᾱ_t is `alphas_cumprod`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.util import UserError, check_choice, check_number, nearest, refuse_if

logger = logging.getLogger(__name__)

PARAMETERIZATIONS = ("eps", "x0", "v")


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Return β_1…β_T, float64 (n_timestep,).

    `linear` is linear in √β, `sqrt_linear` in β, and `sqrt` in β². `cosine` follows arXiv:2102.09672, eq. 17, with
    offset `cosine_s` and β at most 0.999. `squaredcos_cap_v2` is the same with the paper's offset, 0.008.

    Raises:
        UserError: the schedule is unknown.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep) ** 2
    if schedule in ("cosine", "squaredcos_cap_v2"):
        cosine_s = cosine_s if schedule == "cosine" else 8e-3
        time = np.arange(n_timestep + 1) / n_timestep
        alpha_bar = np.cos((time + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2
        return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep) ** 0.5
    known = ["linear", "cosine", "sqrt_linear", "sqrt", "squaredcos_cap_v2"]
    raise UserError(f"beta_schedule {schedule!r} is unknown{nearest(schedule, known)}")


def rescale_to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Return β after shifting and scaling √ᾱ, so that the last ᾱ is 0 and the first is unchanged.

    This is algorithm 1 of arXiv:2305.08891.
    """
    root = np.sqrt(np.cumprod(1.0 - betas))  # √ᾱ
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def diffusion_buffers(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, np.ndarray]:
    """Return the buffers that training and sampling derive from β, float64 (T,), under their names in releases.

    `v_posterior` interpolates the posterior variance between β̃ (0, eq. 7) and β (1).
    """
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = (1 - v_posterior) * betas * (1 - previous) / (1 - alphas_cumprod) + v_posterior * betas
    with np.errstate(divide="ignore"):  # ᾱ is 0 at zero terminal SNR
        recip = 1 / alphas_cumprod
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
        "posterior_variance": posterior_variance,
        # β̃_1 is zero; the clip keeps its logarithm finite.
        "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
        # Eq. 7: μ̃ = coef1 · x₀ + coef2 · x_t
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(alphas) / (1 - alphas_cumprod),
    }


def vlb_weights(buffers: dict[str, np.ndarray], parameterization: str) -> np.ndarray:
    """Return the weights of the squared error in the variational bound, (T,).

    The first weight is infinite and is replaced by the second. Weights are computed in float32 from the stored buffers,
    as in the reference implementation, because 1 − ᾱ depends on the precision at early steps.
    """
    stored = {name: values.astype(np.float32) for name, values in buffers.items()}
    betas, alphas_cumprod = stored["betas"], stored["alphas_cumprod"]
    alphas = (1 - buffers["betas"]).astype(np.float32)
    if parameterization == "eps":  # eq. 12
        with np.errstate(divide="ignore"):
            weights = betas**2 / (2 * stored["posterior_variance"] * alphas * (1 - alphas_cumprod))
    elif parameterization == "x0":  # as in latent diffusion; it does not follow from eq. 8
        weights = 0.5 * np.sqrt(alphas_cumprod) / (2 - alphas_cumprod)
    else:  # v: unweighted, as in latent diffusion
        weights = np.ones_like(betas)
    weights[0] = weights[min(1, len(weights) - 1)]
    if alphas[-1] == 0:  # infinite too at zero terminal SNR
        weights[-1] = weights[-2]
    return weights


def make_ddim_timesteps(ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int) -> np.ndarray:
    """Return the timesteps of DDIM sampling in ascending order (arXiv:2010.02502, appendix D.3).

    `uniform` has a linear stride, and `quad` a quadratic one. All timesteps are shifted by 1.

    Raises:
        UserError: the method is unknown, or the number of steps is not from 1 to `num_ddpm_timesteps`.
    """
    check_number("sampling steps", num_ddim_timesteps, least=1, most=num_ddpm_timesteps)
    check_choice("ddim_discretize", ddim_discr_method, ("uniform", "quad"))
    if ddim_discr_method == "uniform":
        timesteps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps)
    else:
        timesteps = (np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps) ** 2).astype(int)
    # The shift can exceed the last timestep.
    return np.minimum(timesteps + 1, num_ddpm_timesteps - 1)


def extract_into_tensor(values: Tensor, t: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `values[t]` in the shape (B, 1, …, 1), which broadcasts to `shape`."""
    return values[t].view(-1, *(1,) * (len(shape) - 1))


def snr_weights(alphas_cumprod: Tensor, of_x0: Callable[[Tensor], Tensor], parameterization: str) -> Tensor:
    """Return weights (T,) of the squared error of a prediction. `of_x0` gives those of x₀ by SNR = ᾱ / (1 − ᾱ).

    The error of ε is SNR times that of x₀, and the error of v is SNR + 1 times that of x₀ (arXiv:2303.09556,
    section 3.4).
    """
    # The bound avoids 0 / 0 at zero terminal SNR.
    snr = (alphas_cumprod.double() / (1 - alphas_cumprod.double())).clamp(min=1e-300)
    per_x0 = {"eps": snr, "x0": 1.0, "v": snr + 1}[parameterization]
    return (of_x0(snr) / per_x0).float()


# Noise level of x = α x₀ + σ ε: α = √ᾱ and σ = √(1 − ᾱ), numbers or tensors that broadcast to x.
Level = float | Tensor


def noised(x0: Tensor, noise: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """Return x = α x₀ + σ ε (eq. 4)."""
    return alpha * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """Return v = α ε − σ x₀ (arXiv:2202.00512, section 4)."""
    return alpha * noise - sigma * x0


def prediction_to_eps_x0(
    prediction: Tensor, x: Tensor, alpha_bar: Tensor, parameterization: str
) -> tuple[Tensor, Tensor]:
    """Return the noise ε and the clean x₀ of a model's `prediction` for `x`. `alpha_bar` broadcasts to `x`."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if parameterization == "eps":
        return prediction, (x - sigma * prediction) / alpha
    if parameterization == "x0":
        return (x - alpha * prediction) / sigma, prediction
    # (x, v) is a rotation of (x₀, ε), and these two formulas invert it.
    return noised(prediction, x, alpha, sigma), velocity(prediction, x, alpha, sigma)


class GaussianDiffusion:
    """Mixin of a module for the buffers of the noise schedule and the closed forms of the diffusion process.

    The module sets `parameterization` and `v_posterior` before it calls `register_schedule`. `x_start`, `x_t` and
    `noise` have the same shape (B, …). Timesteps `t` (B,) are counted from 0.
    """

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        """Register the float32 buffers of a named schedule or of `given_betas`.

        `rescale_betas_zero_snr` applies `rescale_to_zero_snr`.

        Raises:
            UserError: the schedule is unknown, or a β is not between 0 and 1.
        """
        if rescale_betas_zero_snr and self.parameterization == "eps":
            logger.warning("rescale_betas_zero_snr: at zero SNR, eps carries no signal; set parameterization to v")
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        in_range = len(betas) > 0 and ((betas > 0) & (betas < 1)).all()
        refuse_if(not in_range, f"{len(betas)} betas: give at least one, each between 0 and 1 (timesteps, given_betas)")
        refuse_if(
            rescale_betas_zero_snr and len(betas) == 1,
            "rescale_betas_zero_snr: the schedule has one timestep; give at least 2",
        )
        if rescale_betas_zero_snr:
            betas = rescale_to_zero_snr(betas)
        self.num_timesteps = len(betas)
        buffers = diffusion_buffers(betas, self.v_posterior)
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        weights = torch.tensor(vlb_weights(buffers, self.parameterization), dtype=torch.float32)
        self.register_buffer("lvlb_weights", weights, persistent=False)

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        return extract_into_tensor(getattr(self, name), t, x.shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the noisy x_t at timesteps `t`; see `noised`."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return noised(x_start, noise, *self._level(t, x_start))

    def get_v(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return v at timesteps `t`; see `velocity`."""
        return velocity(x_start, noise, *self._level(t, x_start))

    def _level(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("sqrt_alphas_cumprod", t, x), self._at("sqrt_one_minus_alphas_cumprod", t, x)

    def training_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target of the model's prediction: ε, x₀ or v, by the parameterization."""
        if self.parameterization == "eps":
            return noise
        if self.parameterization == "x0":
            return x_start
        return self.get_v(x_start, noise, t)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t−1} | x_t, x₀) (eqs. 6 and 7)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t)
