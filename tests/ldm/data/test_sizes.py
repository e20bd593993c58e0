"""Images that do not halve evenly are refused before training, with the sizes that would do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.data.sizes import check_sizes, multiple_of
from ldm.util import UserError


def latent_model(is_pre_encoded=lambda x: False):
    unet = SimpleNamespace(downsampling=8)
    return SimpleNamespace(
        first_stage_key="jpg",
        first_stage_model=SimpleNamespace(downsampling=8),
        model=SimpleNamespace(diffusion_model=unet),
        is_pre_encoded=is_pre_encoded,
    )


def test_multiple_of():
    assert multiple_of(latent_model()) == 64
    assert multiple_of(SimpleNamespace(image_key="image", downsampling=4)) == 4
    assert multiple_of(SimpleNamespace()) == 1


@pytest.mark.parametrize("shape", [(500, 512, 3), (512, 500, 1), (3, 512, 500), (500, 500)])
def test_check_sizes_refuses(shape):
    with pytest.raises(UserError, match=r"the train data: 'jpg'.*multiples of 64, such as (448 or 512|512 or 576)"):
        check_sizes(latent_model(), {"jpg": torch.zeros(shape)}, "train")


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (latent_model(), {"jpg": np.zeros((512, 448, 3), np.float32)}),
        (latent_model(lambda x: True), {"jpg": torch.zeros(8, 3, 3)}),
        (latent_model(), {"other": torch.zeros(3, 3, 3)}),
        (latent_model(), {"jpg": "text"}),
        (latent_model(), {"jpg": torch.zeros(5, 5, 7)}),
        (latent_model(), None),
        (None, {"jpg": torch.zeros(3, 3, 3)}),
        (SimpleNamespace(image_key="jpg"), {"jpg": torch.zeros(3, 3, 3)}),
    ],
)
def test_check_sizes_leaves_the_rest_to_the_model(model, sample):
    check_sizes(model, sample, "train")
