"""Spacing of sampling steps: the model times to visit, and ᾱ at each and after it.

T training timesteps, S sampling steps. σ = √((1 − ᾱ) / ᾱ) is the noise level of arXiv:2206.00364. Between training
timesteps, log ᾱ is linear in time, so a model time may be fractional.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps
from ldm.util import UserError, nearest

SPACINGS = ("leading", "linspace", "trailing", "karras")
# Arguments `ddim_discretize` that old scripts give, and no name of a spacing.
_STRIDES = {"leading": "uniform", "uniform": "uniform", "quad": "quad"}
_RHO = 7.0  # arXiv:2206.00364, table 1


class Steps(NamedTuple):
    """Sampling steps from most to least noisy, float64 (S,): model times, ᾱ at each step, and ᾱ after it."""

    times: np.ndarray
    alphas: np.ndarray
    alphas_prev: np.ndarray


def steps_at(spacing: str, count: int, alphas_cumprod: np.ndarray) -> Steps:
    """Return `count` steps of the spacing over the training schedule `alphas_cumprod` (T,).

    leading: a stride of ⌊T / S⌋ from timestep 1 up. There are more steps where `count` does not divide T.
    linspace: equal steps from T − 1 down to 0; the times are fractional.
    trailing: a stride of T / S from T − 1 down, rounded (arXiv:2305.08891, table 2).
    karras: equal steps in σ^(1/7) (arXiv:2206.00364, eq. 5) between the schedule's ends; the times are fractional.

    A `karras` sample ends at ᾱ = 1, without noise; the others end at the schedule's first ᾱ.

    Raises:
        UserError: the spacing is unknown, the schedule has not as many steps, or it ends without signal, where `karras`
            has no largest σ.
    """
    if spacing in _STRIDES:
        times = make_ddim_timesteps(_STRIDES[spacing], count, len(alphas_cumprod))[::-1]
        return _ending_at_the_first(times.astype(np.float64), alphas_cumprod[times], alphas_cumprod)
    most = len(alphas_cumprod) - (spacing == "linspace")
    if not 1 <= count <= most:
        raise UserError(f"{count} sampling steps: choose 1 to {most}")
    if spacing == "linspace":
        times = np.linspace(most, 0, count + 1)[:-1]
        return _ending_at_the_first(times, _alphas_at(times, alphas_cumprod), alphas_cumprod)
    if spacing == "trailing":
        times = np.round(most - np.arange(count) * (most / count)).astype(int) - 1
        return _ending_at_the_first(times.astype(np.float64), alphas_cumprod[times], alphas_cumprod)
    if spacing == "karras":
        return _karras(count, alphas_cumprod)
    raise UserError(f"spacing {spacing!r} is unknown{nearest(spacing, list(SPACINGS))}")


def _karras(count: int, alphas_cumprod: np.ndarray) -> Steps:
    if alphas_cumprod[-1] == 0:
        raise UserError("spacing karras: this model's schedule ends without signal, at infinite noise; use trailing")
    least, most = (((1 - alpha_bar) / alpha_bar) ** (0.5 / _RHO) for alpha_bar in alphas_cumprod[[0, -1]])
    sigmas = np.linspace(most, least, count) ** _RHO
    alphas = 1 / (1 + sigmas**2)
    times = np.interp(-np.log(alphas), -np.log(alphas_cumprod), np.arange(len(alphas_cumprod)))
    return Steps(times, alphas, np.append(alphas[1:], 1.0))


def _alphas_at(times: np.ndarray, alphas_cumprod: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # the logarithm of 0, at a zero terminal SNR, is −∞
        return np.exp(np.interp(times, np.arange(len(alphas_cumprod)), np.log(alphas_cumprod)))


def _ending_at_the_first(times: np.ndarray, alphas: np.ndarray, alphas_cumprod: np.ndarray) -> Steps:
    return Steps(times, alphas, np.append(alphas[1:], alphas_cumprod[0]))
