"""Targets of public configs: where they lead, and what is said of those that lead nowhere."""

import pytest

from ldm.config.trust import check_trust
from ldm.moved_targets import current_path
from ldm.util import UserError, check_params, get_obj_from_str


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("torchvision.transforms.Resize", "ldm.images.augmentations.Resize"),
        ("torchvision.transforms.transforms.Resize", "ldm.images.augmentations.Resize"),
        ("torchvision.transforms.v2.Resize", "ldm.images.augmentations.Resize"),
        ("torchvision.transformsX.Resize", "torchvision.transformsX.Resize"),
        ("taming.data.faceshq.FFHQTrain", "ldm.data.faceshq.FFHQTrain"),
        ("stable_diffusion.ldm.models.autoencoder.AutoencoderKL", "ldm.models.autoencoder.AutoencoderKL"),
        ("edit_dataset.EditDataset", "ldm.data.edit.EditDataset"),
        ("ldm.util.nearest", "ldm.util.nearest"),
    ],
)
def test_current_path(path, expected):
    assert current_path(path) == expected
    if path != expected:
        assert get_obj_from_str(path) is get_obj_from_str(expected)
        check_trust({"target": path}, "config")  # needs no trust, being ours


def test_current_path_of_the_loss_of_codebooks():
    name = "losses.vqperceptual.VQLPIPSWithDiscriminator"
    assert current_path(f"taming.modules.{name}") == f"ldm.modules.{name}"
    check_trust({"target": f"taming.modules.{name}"}, "config")


@pytest.mark.parametrize(
    ("path", "use"),
    [
        ("ldm.data.personalized.PersonalizedBase", "ImageCaptionDataset"),
        ("ldm.data.open-images.OpenImageDataset", "dataset of your own"),
        ("ldm.data.openimages.OpenImagesBBoxTrain", "boxes' tokens"),
        ("ldm.data.simple.ObjaverseDataModuleFromConfig", "image_target"),
        ("torchvision.transforms.FiveCrop", "ldm.images.augmentations"),
    ],
)
def test_instead_is_said_of_what_is_not_here(path, use):
    with pytest.raises(UserError, match=use) as caught:
        get_obj_from_str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["basicsr.data.realesrgan_dataset.RealESRGANDataset", "torchvision.models.resnet18"])
def test_instead_is_said_of_other_packages_that_need_trust(path):
    with pytest.raises(UserError, match=r"list of allowed classes; .*(ImageNetSR|not used here).*--trust-config"):
        check_trust({"target": path}, "config")


def test_instead_of_key_names_what_takes_its_place():
    with pytest.raises(UserError, match=r"unknown key 'reg' in params of .*; .*make_prior"):
        check_params("main.DataModuleFromConfig", get_obj_from_str("main.DataModuleFromConfig"), {"reg": {}})
