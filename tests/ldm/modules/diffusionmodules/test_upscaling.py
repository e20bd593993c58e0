"""The low-resolution image that an upscaler is conditioned on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation, SimpleImageConcat
from ldm.util import UserError
from tests.golden_data import case, reference, relative_error, seeded_tensor

CASE = case("loss_upscale")["low_scale"]
SCHEDULE = {"linear_start": 1e-4, "linear_end": 2e-2}


def test_golden_image_concat_with_noise_augmentation() -> None:
    model = ImageConcatWithNoiseAugmentation(**CASE["params"])
    x = seeded_tensor("loss_upscale/lr", CASE["shape"])
    noise = seeded_tensor("loss_upscale/lr_noise", CASE["shape"])
    noised = model.q_sample(x, torch.tensor(CASE["noise_level"]), noise=noise)
    assert relative_error(noised, reference("loss_upscale", "low_scale")) < 1e-5


def test_noise_levels_are_sampled_below_the_highest() -> None:
    model = ImageConcatWithNoiseAugmentation(SCHEDULE, max_noise_level=3)
    x = torch.zeros(200, 3, 2, 2)
    noised, level = model(x)
    assert set(level.tolist()) == {0, 1, 2}
    assert noised.shape == x.shape and noised.std() > 0
    given, same = model(x, torch.full((200,), 2))
    assert same.unique().tolist() == [2]
    torch.testing.assert_close(given.std(), model.sqrt_one_minus_alphas_cumprod[2], rtol=0.1, atol=0)
    assert model.decode(x) is x


def test_the_schedule_stays_exact_in_half_precision() -> None:
    model = ImageConcatWithNoiseAugmentation(SCHEDULE).bfloat16()
    assert set(model.state_dict()) == {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    }
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_simple_image_concat() -> None:
    x = torch.rand(2, 3, 4, 4)
    same, level = SimpleImageConcat()(x)
    assert same is x and level.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise_schedule_config": {"linear_begin": 1}}, "unknown key 'linear_begin' in noise_schedule_config; did"),
        (
            {"noise_schedule_config": SCHEDULE, "max_noise_level": 1001},
            "max_noise_level 1001: give a whole number from 1 to",
        ),
        ({"noise_schedule_config": {"beta_schedule": "lin"}}, "beta_schedule 'lin' is unknown"),
    ],
)
def test_image_concat_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ImageConcatWithNoiseAugmentation(**options)
