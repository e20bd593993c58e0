"""Spacing of sampling steps: the timesteps that a sampler visits, and their noise levels.

T: training timesteps. S: sampling steps. σ = √((1 − ᾱ) / ᾱ) is the noise level of arXiv:2206.00364. Timesteps may be
fractional. Between training timesteps, log ᾱ is interpolated linearly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps
from ldm.util import check_choice, check_number, refuse_if

SPACINGS = ("leading", "linspace", "trailing", "karras")
# Spacings of `make_ddim_timesteps`, and its names for them, which are valid too.
_STRIDES = {"leading": "uniform", "uniform": "uniform", "quad": "quad"}
_RHO = 7.0  # arXiv:2206.00364, table 1


class Steps(NamedTuple):
    """Sampling steps from most to least noisy, as float64 (S,): timesteps, ᾱ at each step, and ᾱ after it."""

    times: np.ndarray
    alphas: np.ndarray
    alphas_prev: np.ndarray


def steps_at(spacing: str, count: int, alphas_cumprod: np.ndarray) -> Steps:
    """Return `count` steps of a spacing of the training schedule `alphas_cumprod` (T,).

    leading: stride ⌊T / S⌋ upwards from timestep 1. There are more steps if `count` does not divide T.
    linspace: equal steps from T − 1 down to 0. Times are fractional.
    trailing: stride T / S downwards from T − 1, rounded (arXiv:2305.08891, table 2).
    karras: equal steps of σ^(1/7) from the highest to the lowest σ, then σ = 0 (arXiv:2206.00364, eq. 5). Times are
        fractional.

    The last step ends at ᾱ = 1 for `karras`, and at the schedule's first ᾱ for the other spacings.

    Raises:
        UserError: the spacing is unknown, the schedule has fewer steps, or `karras` has no highest σ because the last
            ᾱ is 0.
    """
    if spacing in _STRIDES:
        times = make_ddim_timesteps(_STRIDES[spacing], count, len(alphas_cumprod))[::-1]
        return _ending_at_the_first(times, alphas_cumprod[times], alphas_cumprod)
    check_choice("spacing", spacing, SPACINGS)
    last = len(alphas_cumprod) - 1
    check_number("sampling steps", count, least=1, most=last if spacing == "linspace" else last + 1)
    if spacing == "karras":
        return _karras(count, alphas_cumprod)
    if spacing == "trailing":
        times = np.round((last + 1) * (1 - np.arange(count) / count)).astype(int) - 1
        return _ending_at_the_first(times, alphas_cumprod[times], alphas_cumprod)
    times = np.linspace(last, 0, count + 1)[:-1]
    return _ending_at_the_first(times, _alphas_at(times, alphas_cumprod), alphas_cumprod)


def _karras(count: int, alphas_cumprod: np.ndarray) -> Steps:
    refuse_if(
        alphas_cumprod[-1] == 0, "spacing karras: this model has zero terminal SNR, and so no highest σ; use trailing"
    )
    least, most = (((1 - alpha_bar) / alpha_bar) ** (0.5 / _RHO) for alpha_bar in alphas_cumprod[[0, -1]])
    sigmas = np.linspace(most, least, count) ** _RHO
    alphas = 1 / (1 + sigmas**2)
    times = np.interp(-np.log(alphas), -np.log(alphas_cumprod), np.arange(len(alphas_cumprod)))
    return Steps(times, alphas, np.append(alphas[1:], 1.0))


def _alphas_at(times: np.ndarray, alphas_cumprod: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # log 0 = −∞ at zero terminal SNR
        return np.exp(np.interp(times, np.arange(len(alphas_cumprod)), np.log(alphas_cumprod)))


def _ending_at_the_first(times: np.ndarray, alphas: np.ndarray, alphas_cumprod: np.ndarray) -> Steps:
    return Steps(times.astype(np.float64), alphas, np.append(alphas[1:], alphas_cumprod[0]))
