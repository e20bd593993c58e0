"""AutoencoderKL: golden numbers, released keys, an independent implementation, and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch.utils.data import DataLoader

from ldm.checkpoint import save_state_dict
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.util import UserError, instantiate_from_config
from tests.golden_data import case, cases, fill_seeded, relative_error, released_keys, seeded_tensor, tensors

IDENTITY = {"target": "torch.nn.Identity"}
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
SD_V1 = {**DDCONFIG, "resolution": 256, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}


def gan(**params: Any) -> dict[str, Any]:
    return {
        "target": "ldm.modules.losses.LPIPSWithDiscriminator",
        "params": {"disc_start": 0, "kl_weight": 1e-6, "disc_num_layers": 2, "perceptual_weight": 0, **params},
    }


def seeded_image(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return (0.5 * seeded_tensor(name, shape)).clamp(-1, 1)


@pytest.fixture
def image_loader() -> DataLoader:
    """Return eight smooth images, channels last, in batches of four."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").movedim(1, -1) * 2 - 1
    return DataLoader([{"image": image} for image in images], batch_size=4)


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, **quiet, **options)


# Numbers


@pytest.mark.parametrize("name", cases("autoencoder_kl"))
def test_golden(name: str) -> None:
    spec, golden = case(name), tensors("cases")
    model = fill_seeded(instantiate_from_config({"target": spec["target"], "params": spec["params"]})).eval()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == spec["keys"]
    z = seeded_tensor(f"{name}/z", spec["z_shape"])
    with torch.no_grad():
        posterior = model.encode(seeded_image(f"{name}/x", spec["x_shape"]))
        decoded = model.decode(z)
    assert relative_error(posterior.parameters, golden[f"{name}/moments"]) < 1e-5
    assert relative_error(posterior.kl(), golden[f"{name}/kl"]) < 1e-5
    assert relative_error(posterior.nll(z), golden[f"{name}/nll"]) < 1e-5
    assert relative_error(decoded, golden[f"{name}/decoded"]) < 1e-5


@pytest.mark.slow
def test_golden_sd_v1() -> None:
    golden = tensors("sd_v1_full")
    model = fill_seeded(AutoencoderKL(SD_V1, IDENTITY, embed_dim=4), "first_stage_model.").eval()
    with torch.no_grad():
        decoded, posterior = model(seeded_image("sd_v1/image", (1, 3, 64, 64)), sample_posterior=False)
    assert relative_error(posterior.parameters, golden["sd_v1/moments"]) < 1e-5
    assert relative_error(decoded, golden["sd_v1/decoded"]) < 1e-5


def test_released_keys() -> None:
    with torch.device("meta"):
        model = AutoencoderKL(SD_V1, IDENTITY, embed_dim=4)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == released_keys("first_stage_model.")


def test_agrees_with_diffusers() -> None:
    model = fill_seeded(AutoencoderKL({**DDCONFIG, "ch_mult": [1, 2, 2]}, IDENTITY, embed_dim=4)).eval()
    other = DiffusersAutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 64, 64],
        layers_per_block=1,
        latent_channels=4,
    ).eval()
    other.load_state_dict(convert_ldm_vae_checkpoint(model.state_dict(), other.config))
    x, z = seeded_image("x", (2, 3, 32, 48)), seeded_tensor("z", (2, 4, 8, 12))
    with torch.no_grad():
        assert relative_error(model.encode(x).parameters, other.encode(x).latent_dist.parameters) < 1e-5
        assert relative_error(model.decode(z), other.decode(z).sample) < 1e-5


# Configs and input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"double_z": False}, "double_z must be true"),
        ({"chmult": [1]}, "unknown key 'chmult' in params of ddconfig; did you mean 'ch_mult'"),
    ],
)
def test_bad_ddconfig(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AutoencoderKL({**DDCONFIG, **change}, IDENTITY, embed_dim=4)


def test_incomplete_ddconfig() -> None:
    incomplete = {key: value for key, value in DDCONFIG.items() if key != "out_ch"}
    with pytest.raises(UserError, match="lacks the key 'out_ch'"):
        AutoencoderKL(incomplete, IDENTITY, embed_dim=4)


def test_get_input() -> None:
    model = AutoencoderKL(DDCONFIG, IDENTITY, embed_dim=4, image_key="jpg")
    image = torch.randn(2, 8, 6, 3, dtype=torch.double)
    assert torch.equal(model.get_input({"jpg": image}, "jpg"), image.permute(0, 3, 1, 2).float())
    assert model.get_input({"jpg": image[..., 0]}, "jpg").shape == (2, 1, 8, 6)
    with pytest.raises(UserError, match="image_key 'jpg' is not in the batch, which has png"):
        model.get_input({"png": image}, "jpg")


def test_starts_from_a_checkpoint_and_ignores_keys(tmp_path: Path) -> None:
    source = AutoencoderKL(DDCONFIG, gan(), embed_dim=4)
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("post_quant_conv")}
    path = tmp_path / "first_stage.ckpt"
    torch.save({"state_dict": {**state, "loss.perceptual_loss.lin0.weight": torch.ones(1)}}, path)
    model = AutoencoderKL(
        DDCONFIG, IDENTITY, embed_dim=4, ckpt_path=str(path), ignore_keys=["post_quant", "encoder.mid"]
    )
    assert torch.equal(model.encoder.conv_in.weight, source.encoder.conv_in.weight)
    assert not torch.equal(model.encoder.mid.block_1.conv1.weight, source.encoder.mid.block_1.conv1.weight)
    with pytest.raises(UserError, match="lacks post_quant_conv"):
        AutoencoderKL(DDCONFIG, IDENTITY, embed_dim=4, ckpt_path=str(path))


@pytest.mark.parametrize("kind", ["release", "diffusers"])
def test_starts_from_the_autoencoder_of_any_file(tmp_path: Path, kind: str) -> None:
    source = fill_seeded(AutoencoderKL({**DDCONFIG, "ch_mult": [1, 2, 2]}, IDENTITY, embed_dim=4))
    weights = source.state_dict()
    if kind == "release":
        weights = {f"first_stage_model.{key}": value for key, value in weights.items()}
        weights["model.diffusion_model.out.2.weight"] = torch.ones(1)
    else:
        config = DiffusersAutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[32, 64, 64],
            layers_per_block=1,
        ).config
        weights = convert_ldm_vae_checkpoint(weights, config)
    path = tmp_path / "any.safetensors"
    save_state_dict(weights, path)
    model = AutoencoderKL({**DDCONFIG, "ch_mult": [1, 2, 2]}, IDENTITY, embed_dim=4, ckpt_path=str(path))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


# Training


def test_identity_loss_is_for_frozen_use(tmp_path: Path, image_loader: DataLoader) -> None:
    model = AutoencoderKL(DDCONFIG, IDENTITY, embed_dim=4)
    with pytest.raises(UserError, match=r"set lossconfig.target to ldm.modules.losses.LPIPSWithDiscriminator"):
        trainer(tmp_path, max_steps=1).fit(model, image_loader)


def test_training_needs_a_learning_rate(tmp_path: Path, image_loader: DataLoader) -> None:
    model = AutoencoderKL(DDCONFIG, gan(), embed_dim=4)
    with pytest.raises(UserError, match=r"set model\.base_learning_rate"):
        trainer(tmp_path, max_steps=1).fit(model, image_loader)


def test_images_that_do_not_halve_evenly(tmp_path: Path) -> None:
    model = AutoencoderKL(DDCONFIG, gan(), embed_dim=4)
    with pytest.raises(UserError, match="images of 31x32 do not halve evenly"):
        trainer(tmp_path).validate(model, DataLoader([{"image": torch.zeros(31, 32, 3)}]))


@pytest.mark.slow
def test_training_without_gan(tmp_path: Path, image_loader: DataLoader) -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG, gan(disc_factor=0.0), embed_dim=4)
    model.learning_rate = 1e-3
    discriminator = model.loss.discriminator.main[0].weight.clone()
    run = trainer(tmp_path, max_epochs=20, accumulate_grad_batches=2, gradient_clip_val=1e5)
    run.validate(model, image_loader, verbose=False)
    before = run.callback_metrics["val/rec_loss"].item()
    run.fit(model, image_loader, image_loader)
    assert run.callback_metrics["val/rec_loss"].item() < 0.7 * before
    assert {"train/rec_loss", "train/kl_loss", "train/total_loss", "val/kl_loss"} <= set(run.callback_metrics)
    assert run.global_step == model.autoencoder_steps == 20
    assert torch.equal(model.loss.discriminator.main[0].weight, discriminator)


def test_the_optimizer_has_the_parts_in_the_order_of_older_checkpoints() -> None:
    model = AutoencoderKL(DDCONFIG, gan(disc_factor=0.0), embed_dim=4)
    model.learning_rate = 1e-3
    names = {id(parameter): name.split(".")[0] for name, parameter in model.named_parameters()}
    (optimizer,) = model.configure_optimizers()
    order = dict.fromkeys(names[id(parameter)] for parameter in optimizer.param_groups[0]["params"])
    assert list(order) == ["encoder", "decoder", "quant_conv", "post_quant_conv"]


@pytest.mark.parametrize("loss", [gan(disc_factor=0.0), gan()], ids=["plain", "gan"])
def test_a_frozen_encoder_leaves_the_latents_as_they_are(tmp_path: Path, image_loader: DataLoader, loss: dict) -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG, loss, embed_dim=4, freeze_encoder=True)
    model.learning_rate = 1e-3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer(tmp_path, max_epochs=1).fit(model, image_loader)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"decoder", "post_quant_conv", *(["loss"] if model.adversarial else [])}


@pytest.mark.slow
def test_training_with_gan(tmp_path: Path, image_loader: DataLoader) -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG, gan(disc_start=3), embed_dim=4)
    model.learning_rate = 1e-3
    first = {name: value.clone() for name, value in model.state_dict().items()}

    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, image_loader, image_loader)
    assert model.autoencoder_steps == 2
    assert not torch.equal(model.decoder.conv_out.weight, first["decoder.conv_out.weight"])
    # The discriminator waits for disc_start.
    assert torch.equal(model.loss.discriminator.main[0].weight, first["loss.discriminator.main.0.weight"])

    run = trainer(tmp_path, max_epochs=3)
    run.fit(model, image_loader, image_loader)
    assert model.autoencoder_steps == 6
    assert {"train/g_loss", "train/d_weight", "train/disc_loss", "val/disc_loss"} <= set(run.callback_metrics)
    assert not torch.equal(model.loss.discriminator.main[0].weight, first["loss.discriminator.main.0.weight"])
    assert all(parameter.requires_grad for parameter in model.loss.discriminator.parameters())
    assert torch.equal(model.loss.logvar, first["loss.logvar"])


# Images


def test_log_images(image_loader: DataLoader) -> None:
    model = AutoencoderKL(DDCONFIG, IDENTITY, embed_dim=4)
    batch = next(iter(image_loader))
    images = model.log_images(batch, N=3)
    assert {name: tuple(image.shape) for name, image in images.items()} == dict.fromkeys(
        ("inputs", "reconstructions", "samples"), (3, 3, 32, 32)
    )
    torch.testing.assert_close(images["inputs"], batch["image"][:3].movedim(-1, 1))
    assert list(model.log_images(batch, only_inputs=True)) == ["inputs"]


def test_log_images_of_label_maps() -> None:
    ddconfig = {**DDCONFIG, "in_channels": 5, "out_ch": 5}
    model = AutoencoderKL(ddconfig, IDENTITY, embed_dim=4, colorize_nlabels=5)
    for image in model.log_images({"image": torch.rand(2, 16, 16, 5)}).values():
        assert image.shape == (2, 3, 16, 16)
        assert image.min() == -1.0
        assert image.max() == 1.0


def test_identity_first_stage() -> None:
    x = torch.randn(1, 3, 4, 4)
    stage = IdentityFirstStage()
    assert all(function(x) is x for function in (stage, stage.encode, stage.decode, stage.quantize))
    assert IdentityFirstStage(vq_interface=True).quantize(x) == (x, None, [None, None, None])
