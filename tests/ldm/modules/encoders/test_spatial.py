"""Cond stages that keep an image an image."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ldm.modules.encoders.spatial import LowScaleEncoder, SpatialRescaler
from ldm.util import UserError
from tests.golden_data import fill_seeded, seeded_tensor

FIRST_STAGE = {"target": "ldm.models.autoencoder.IdentityFirstStage"}


def test_spatial_rescaler() -> None:
    x = seeded_tensor("rescaler/x", (2, 5, 16, 8))
    model = fill_seeded(SpatialRescaler(n_stages=2, in_channels=5, out_channels=3))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        "channel_mapper.weight": (3, 5, 1, 1)
    }
    smaller = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear")
    assert torch.equal(model.encode(x), model.channel_mapper(smaller))
    plain = SpatialRescaler(n_stages=1, method="nearest")
    assert not plain.state_dict()
    assert torch.equal(plain(x), x[:, :, ::2, ::2])
    assert "channel_mapper.bias" in SpatialRescaler(out_channels=3, bias=True).state_dict()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "cubic"}, "method 'cubic' is unknown; did you mean 'bicubic'"),
        ({"n_stages": -1}, "n_stages -1: give a whole number of at least 0"),
    ],
)
def test_spatial_rescaler_refuses(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        SpatialRescaler(**options)


def test_low_scale_encoder() -> None:
    model = LowScaleEncoder(FIRST_STAGE, 1e-4, 2e-2, max_noise_level=5, output_size=8, scale_factor=0.5)
    x = seeded_tensor("low/x", (3, 3, 4, 4))
    torch.manual_seed(0)
    noised, level = model(x)
    assert noised.shape == (3, 3, 8, 8) and level.shape == (3,) and int(level.max()) < 5
    torch.manual_seed(0)
    expected = model.q_sample(0.5 * x, torch.randint(0, 5, (3,)))
    assert torch.equal(noised[..., ::2, ::2], expected)
    torch.testing.assert_close(model.decode(0.5 * x), x)
    assert LowScaleEncoder(FIRST_STAGE, 1e-4, 2e-2, output_size=None).encode(x)[0].shape == x.shape
