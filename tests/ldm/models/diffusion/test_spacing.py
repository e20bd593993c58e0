"""The spacing of sampling steps against hand-computed values and the schedulers of diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from ldm.models.diffusion.spacing import steps_at
from ldm.modules.diffusionmodules.schedule import make_beta_schedule, rescale_to_zero_snr
from ldm.util import UserError

BETAS = make_beta_schedule("linear", 1000, 0.00085, 0.012)
ALPHA_BAR = np.cumprod(1 - BETAS)
ZERO = np.cumprod(1 - rescale_to_zero_snr(BETAS))
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def test_leading_is_the_stride_of_ddim() -> None:
    steps = steps_at("leading", 5, ALPHA_BAR)
    assert steps.times.tolist() == [801, 601, 401, 201, 1]
    assert np.array_equal(steps.alphas, ALPHA_BAR[[801, 601, 401, 201, 1]])
    assert np.array_equal(steps.alphas_prev, ALPHA_BAR[[601, 401, 201, 1, 0]])
    assert len(steps_at("leading", 400, ALPHA_BAR).times) == 500


def test_trailing_begins_at_the_last_timestep() -> None:
    """Table 2 of arXiv:2305.08891 counts from 1: for 10 steps 1000, 900, …, 100."""
    assert (steps_at("trailing", 10, ALPHA_BAR).times + 1).tolist() == list(range(1000, 0, -100))
    assert steps_at("trailing", 3, ALPHA_BAR).times.tolist() == [999, 666, 332]  # 1000, 666.67, 333.33, less 1
    assert steps_at("trailing", 1000, ALPHA_BAR).times.tolist() == list(range(999, -1, -1))
    assert steps_at("trailing", 1, ZERO).alphas.tolist() == [0.0]
    assert steps_at("trailing", 3, ALPHA_BAR).alphas_prev.tolist() == ALPHA_BAR[[666, 332, 0]].tolist()


def test_linspace_is_equal_in_time() -> None:
    steps = steps_at("linspace", 4, ALPHA_BAR)
    assert steps.times.tolist() == [999, 749.25, 499.5, 249.75]
    assert steps.alphas[2] == pytest.approx((ALPHA_BAR[499] * ALPHA_BAR[500]) ** 0.5)
    assert steps.alphas_prev[-1] == ALPHA_BAR[0]


def test_karras_by_hand() -> None:
    """A schedule whose ends are σ = 10 and σ = 0.1: the middle is the mean of their seventh roots."""
    sigmas = np.geomspace(0.1, 10, 101)
    steps = steps_at("karras", 3, 1 / (1 + sigmas**2))
    middle = ((10 ** (1 / 7) + 0.1 ** (1 / 7)) / 2) ** 7
    assert middle == pytest.approx(1.4507, abs=1e-4)
    assert np.sqrt(1 / steps.alphas - 1) == pytest.approx([10, middle, 0.1])
    assert np.sqrt(np.maximum(1 / steps.alphas_prev - 1, 0)) == pytest.approx([middle, 0.1, 0])
    # 101 levels, equal in log σ from 0.1 to 10: 50 to a power of ten
    assert steps.times == pytest.approx([100, 50 * np.log10(middle / 0.1), 0], abs=0.01)
    assert steps.times[1] % 1 > 0


@pytest.mark.parametrize("count", [2, 7, 20])
def test_karras_agrees_with_diffusers(count: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=True)
    scheduler.set_timesteps(count)
    steps = steps_at("karras", count, ALPHA_BAR)
    ours = np.append(np.sqrt(1 / steps.alphas - 1), 0.0)
    assert ours == pytest.approx(scheduler.sigmas.double().numpy(), rel=1e-4)
    # Theirs are linear in log σ between timesteps, ours in log ᾱ: they differ near the first timestep alone.
    assert steps.times == pytest.approx(scheduler.timesteps.double().numpy(), abs=0.1)
    assert steps.alphas_prev[-1] == 1


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("count", [1, 3, 7, 30, 50, 999])
def test_trailing_agrees_with_diffusers(count: int, zero_snr: bool) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr, set_alpha_to_one=False
    )
    scheduler.set_timesteps(count)
    steps = steps_at("trailing", count, ZERO if zero_snr else ALPHA_BAR)
    assert steps.times.tolist() == scheduler.timesteps.tolist()
    theirs = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    assert steps.alphas == pytest.approx(theirs, rel=1e-4, abs=1e-7)


def test_leading_agrees_with_diffusers() -> None:
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(25)
    assert steps_at("leading", 25, ALPHA_BAR).times.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("spacing", "count", "message"),
    [
        ("even", 5, "spacing 'even' is unknown; valid: karras, leading, linspace, trailing"),
        ("karras", 0, "sampling steps 0: give a whole number from 1 to 1000"),
        ("trailing", 1001, "sampling steps 1001: give a whole number from 1 to 1000"),
        ("linspace", 1000, "sampling steps 1000: give a whole number from 1 to 999"),
        ("leading", 1001, "sampling steps 1001: give a whole number from 1 to 1000"),
    ],
)
def test_steps_that_there_are_not(spacing: str, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        steps_at(spacing, count, ALPHA_BAR)


def test_karras_of_a_schedule_without_signal() -> None:
    with pytest.raises(UserError, match=r"spacing karras: .* use trailing"):
        steps_at("karras", 5, ZERO)
