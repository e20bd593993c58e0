"""Tests of the fixed parts of an evaluation."""

import pytest
import torch

from ldm.evaluation.protocol import fixed_noise, midpoint_timesteps, spread
from ldm.util import UserError


def test_timesteps_are_the_midpoints_of_equal_strata():
    assert midpoint_timesteps(1000, 8) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert midpoint_timesteps(10, 5) == [1, 3, 5, 7, 9]
    assert midpoint_timesteps(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 11])
def test_more_timesteps_than_the_model_has_are_refused(count):
    with pytest.raises(UserError, match="choose 1 to 10"):
        midpoint_timesteps(10, count)


def test_noise_follows_from_key_and_timestep_alone():
    torch.manual_seed(1)
    first = fixed_noise("a", 62, (4, 8, 8))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert fixed_noise("a", 62, (4, 8, 8)).equal(first)
    assert torch.get_rng_state().equal(state)
    others = [fixed_noise("b", 62, (4, 8, 8)), fixed_noise("a", 187, (4, 8, 8)), fixed_noise("2/a", 6, (4, 8, 8))]
    assert not any(other.equal(first) for other in others)
    assert abs(float(first.mean())) < 0.2 and abs(float(first.std()) - 1) < 0.2


def test_fixed_noise_never_changes():
    torch.testing.assert_close(
        fixed_noise("a", 62, (4,)), torch.tensor([-0.13342, -1.143447, 1.621461, 0.550089]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(5, None, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (10, 3, [0, 3, 6]), (4, 2, [0, 2]), (0, 3, [])],
)
def test_a_limit_spreads_over_the_set(count, limit, expected):
    assert spread(count, limit).tolist() == expected
