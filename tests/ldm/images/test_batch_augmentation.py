"""Augmentation of image batches on the device."""

from __future__ import annotations

import sys

import pytest
import torch

from ldm.data.config_module import DataModuleFromConfig
from ldm.images.batch_augmentation import BatchAugmentation
from ldm.shards.sample import STREAM
from ldm.util import UserError

ALL = {
    "random_resized_crop": {"scale": [0.5, 0.8], "ratio": [0.9, 1.1]},
    "color_jitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05},
    "affine": {"degrees": 10, "translate": [0.1, 0.1]},
}
NAMES = ["0/0/3", "0/0/7", "0/1/3"]


@pytest.fixture
def images() -> torch.Tensor:
    """Three smooth images (3, 32, 48, 3) in [-1, 1]."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 48), indexing="ij")
    image = torch.stack([rows, columns, rows * columns], -1)
    return torch.stack([image, -image, image])


@pytest.mark.parametrize("names", [[name] for name in ALL] + [list(ALL)])
def test_batch_augmentation_depends_on_the_name_of_a_sample_alone(images, names):
    augment = BatchAugmentation({name: ALL[name] for name in names})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = augment(images, NAMES)
    assert torch.equal(torch.get_rng_state(), before), "training's random numbers stay as they were"
    assert together.shape == images.shape and together.dtype == images.dtype
    assert together.min() >= -1 and together.max() <= 1
    torch.manual_seed(1)
    alone = torch.cat([augment(images[i : i + 1], NAMES[i : i + 1]) for i in (2, 1, 0)])
    torch.testing.assert_close(together, alone.flip(0), atol=1e-5, rtol=0)
    assert (together - images).abs().amax((1, 2, 3)).min() > 0.05, "each is changed"
    assert (together[0] - together[2]).abs().max() > 0.01, "one image in two epochs"


def test_batch_augmentation_with_neutral_values_changes_nothing(images):
    neutral = {"affine": {"degrees": 0}, "color_jitter": {"brightness": 0.0}}
    torch.testing.assert_close(BatchAugmentation(neutral)(images, NAMES), images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ({"colour_jitter": {}}, "unknown key 'colour_jitter' in data.params.augment; did you mean 'color_jitter'"),
        ({"affine": {"degree": 3}}, "unknown key 'degree' in data.params.augment.affine; did you mean 'degrees'"),
        ({"color_jitter": {"brightness": -1}}, "augment.color_jitter {'brightness': -1}: "),
        ({"random_resized_crop": {"scale": "all"}}, "augment.random_resized_crop {'scale': 'all'}: "),
    ],
)
def test_batch_augmentation_refuses_in_one_line(operations, message):
    with pytest.raises(UserError) as refused:
        BatchAugmentation(operations)
    assert message in str(refused.value)


def test_batch_augmentation_without_kornia_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(UserError, match=r"needs kornia: pip install -c constraints.txt '\.\[augment\]'"):
        BatchAugmentation(ALL)


class _Trainer:
    overfit_batches = 0

    def __init__(self, training: bool) -> None:
        self.training = training


@pytest.mark.parametrize("training", [True, False])
def test_data_module_augments_training_batches_alone(images, training):
    module = DataModuleFromConfig(3, num_workers=0, augment=ALL)
    module.trainer = _Trainer(training)
    batch = {"image": images, STREAM: NAMES, "caption": ["a", "b", "c"]}
    given = module.on_after_batch_transfer(batch, 0)
    assert torch.equal(given["image"], images) is not training
    assert given["caption"] == batch["caption"]


def test_data_module_names_the_entry_that_augment_lacks(images):
    module = DataModuleFromConfig(3, num_workers=0, augment=ALL, image_key="jpg")
    module.trainer = _Trainer(True)
    with pytest.raises(UserError, match="no entry 'jpg'; set image_key"):
        module.on_after_batch_transfer({"image": images, STREAM: NAMES}, 0)
