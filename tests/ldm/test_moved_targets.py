"""Targets of public configs: where they lead, and what is said of those that lead nowhere."""

import pytest

from ldm.config.trust import check_trust
from ldm.moved_targets import changes_training, current_path, without_unused_keys
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
        ("invokeai.backend.models.diffusion.ddpm.LatentDiffusion", "ldm.models.diffusion.ddpm.LatentDiffusion"),
        ("invokeai.backend.stable_diffusion.autoencoder.AutoencoderKL", "ldm.models.autoencoder.AutoencoderKL"),
        (
            "invokeai.backend.stable_diffusion.encoders.modules.WeightedFrozenCLIPEmbedder",
            "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        ),
        ("main.LearningRateMonitor", "pytorch_lightning.callbacks.LearningRateMonitor"),
        ("taming.modules.losses.vqperceptual.DummyLoss", "ldm.modules.losses.vqperceptual.DummyLoss"),
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
        ("ldm.models.diffusion.ddpm.LatentDiffusionSRTextWTFFHQ", "LatentUpscaleDiffusion"),
        ("ldm.data.local.LocalBase", "belongs to a fork; use ldm.data.datasets.ImageCaptionDataset"),
        ("ldm.modules.encoders.xlmr.BertSeriesModelWithTransformation", "AltDiffusion"),
        ("ldm.modules.encoders.modules.PersonalizedCLIPEmbedder", "aesthetic gradients are not here"),
        ("ldm.modules.embedding_manager.EmbeddingManager", "textual_inversion.yaml"),
        ("cldm.cldm.ControlLDM", "ControlNet is not here; .*stable_diffusion_v1.yaml"),
        ("src.model.CustomDiffusion", "unet_trainable: attn"),
        ("sgm.models.diffusion.DiffusionEngine", "stable_diffusion_xl.yaml"),
    ],
)
def test_instead_is_said_of_what_is_not_here(path, use):
    with pytest.raises(UserError, match=use) as caught:
        get_obj_from_str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["ldm.data.local.LocalBase", "taming.data.ffhq.FFHQSRTrain"])
def test_instead_is_said_of_the_datasets_of_forks(path):
    with pytest.raises(UserError, match=r"it belongs to a fork; use ldm.data.datasets.*; give --trust"):
        check_trust({"target": path}, "config")


@pytest.mark.parametrize("path", ["basicsr.data.realesrgan_dataset.RealESRGANDataset", "torchvision.models.resnet18"])
def test_instead_is_said_of_other_packages_that_need_trust(path):
    with pytest.raises(UserError, match=r"list of allowed classes; .*(ImageNetSR|not used here).*--trust-config"):
        check_trust({"target": path}, "config")


def test_without_unused_keys_keeps_the_keys_of_other_classes():
    params = {"personalization_config": {}, "model_lr": 1.0, "timesteps": 1000}
    for target in (
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "invokeai.backend.models.diffusion.ddpm.LatentDiffusion",
    ):
        assert without_unused_keys(target, params) == ({"timesteps": 1000}, ["personalization_config", "model_lr"])
    for target in ("ldm.models.autoencoder.AutoencoderKL", None, 3):
        assert without_unused_keys(target, params) == (params, [])


@pytest.mark.parametrize(("value", "unused"), [(False, ["add_conv_in_front_of_unet"]), (True, []), (0.5, [])])
def test_without_unused_keys_drops_only_neutral_values(value, unused):
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    assert without_unused_keys(target, {"add_conv_in_front_of_unet": value})[1] == unused


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("personalization_config", {"target": "x"}, True),
        ("personalization_config", None, False),
        ("unfreeze_model", False, True),
        ("unfreeze_model", True, False),
        ("model_lr", 1e-6, False),  # the learning rate of all weights
        ("model_lr", 1e-7, True),
        ("embedding_reg_weight", 0.0, False),
        ("embedding_reg_weight", 0.1, True),
        ("reg_weight", 1.0, True),
        ("u_cond_percent", 0.2, True),
    ],
)
def test_changes_training(key, value, changes):
    assert changes_training(key, value, 1e-6) is changes


def test_check_trust_skips_unused_keys():
    theirs = {"target": "ldm.modules.embedding_manager.EmbeddingManager"}
    described = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"personalization_config": theirs}}
    check_trust(described, "config")
    for params in ({"unet_config": theirs}, {"personalization_config": None, "first_stage_config": theirs}):
        with pytest.raises(UserError, match="EmbeddingManager"):
            check_trust({**described, "params": params}, "config")


def test_hint_for_key_names_what_takes_its_place():
    with pytest.raises(UserError, match=r"unknown key 'reg' in params of .*; .*make_prior"):
        check_params("main.DataModuleFromConfig", get_obj_from_str("main.DataModuleFromConfig"), {"reg": {}})


@pytest.mark.parametrize(
    ("key", "use"),
    [
        ("lora_config", "extract_lora"),
        ("network_dim", "extract_lora"),
        ("control_stage_config", "ControlNet is not here"),
        ("from_pretrained", "--finetune_from"),
        ("first_stage_trainable", "its own config"),
        ("learning_rate", "base_learning_rate"),
        ("noise_offset", "noise_config"),
    ],
)
def test_hint_for_key_names_what_takes_the_place_of_keys_of_other_trainers(key, use):
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    with pytest.raises(UserError, match=rf"unknown key '{key}' in params of .*; .*{use}"):
        check_params(target, get_obj_from_str(target), {key: 1})
