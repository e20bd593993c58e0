"""What a latent diffusion model does with a batch: stages, conditioning, parameters that train, pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.models.diffusion.ddpm import DiffusionWrapper, LatentDiffusion
from ldm.util import UserError, instantiate_from_config
from tests.golden_data import case, fill_seeded, seeded_tensor

TEXT_TOWER = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 64,
        }
    },
}


def construct(cond_stage: dict | str, unet: dict | None = None, **params: object) -> LatentDiffusion:
    torch.manual_seed(0)
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            **{key: value for key, value in case("loss_eps")["params"].items() if key != "unet"},
            "unet_config": {"target": case("unet_sd_tiny")["target"], "params": unet or case("unet_sd_tiny")["params"]},
            "first_stage_config": {"target": case("vae_tiny")["target"], "params": case("vae_tiny")["params"]},
            "cond_stage_config": cond_stage,
            **params,
        },
    }
    return instantiate_from_config(config)


def batch_of(f8: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"f8": seeded_tensor("latent/f8", f8).half(), "t5": seeded_tensor("latent/t5", (2, 7, 64)).half()}


def test_posterior_gives_a_fresh_latent_each_step(model: LatentDiffusion) -> None:
    encoded = model.encode_batch(batch_of((2, 8, 8, 8)))
    first, second = model.get_first_stage_encoding(encoded), model.get_first_stage_encoding(encoded)
    assert first.shape == (2, 4, 8, 8)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)


def test_stored_latent_is_used_as_it_is(model: LatentDiffusion) -> None:
    batch = batch_of((2, 4, 8, 8))
    latent = model.get_first_stage_encoding(model.encode_batch(batch))
    assert torch.equal(latent, model.scale_factor * batch["f8"].float())


def test_pixels_are_encoded(model: LatentDiffusion) -> None:
    images = seeded_tensor("latent/images", (2, 64, 64, 3), 0.5).clamp(-1, 1)
    encoded = model.encode_batch({"f8": images})
    expected = model.first_stage_model.encode(images.permute(0, 3, 1, 2).contiguous())
    assert torch.equal(encoded.parameters, expected.parameters)


def test_only_the_unet_trains(model: LatentDiffusion) -> None:
    loss, _ = model.shared_step(batch_of((2, 8, 8, 8)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())
    assert all(parameter.grad is None for parameter in model.first_stage_model.parameters())
    assert {id(p) for p in model.trained_parameters()} == {id(p) for p in model.model.parameters()}


def test_frozen_stages_stay_in_evaluation_mode(model: LatentDiffusion) -> None:
    model.train()
    assert model.model.training
    assert not model.first_stage_model.training


def test_text_tower_trains_along() -> None:
    model = construct(TEXT_TOWER, cond_stage_trainable=True, cond_stage_key="txt")
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    model.shared_step(batch)[0].backward()
    tower = model.cond_stage_model.transformer
    assert all(parameter.grad is not None for parameter in tower.parameters())
    assert len(model.trained_parameters()) == len([*model.model.parameters(), *tower.parameters()])
    assert model.cond_stage_model.training


def test_gradients_pass_through_a_frozen_unet() -> None:
    options = {"cond_stage_trainable": True, "cond_stage_key": "txt", "unet_trainable": False, "use_ema": False}
    model = fill_seeded(construct(TEXT_TOWER, **options)).train()
    assert not any(module.training for module in model.model.modules())
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    model.shared_step(batch)[0].backward()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    tower = list(model.cond_stage_model.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in tower) > 0
    assert {id(p) for p in model.trained_parameters()} == {id(p) for p in tower}


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"use_ema": True, "cond_stage_trainable": True}, "use_ema: true averages the UNet.*; set use_ema: false$"),
        ({"use_ema": False}, "unet_trainable: false leaves nothing to train; set cond_stage_trainable: true"),
    ],
)
def test_a_frozen_unet_is_refused(params: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        construct(TEXT_TOWER, unet_trainable=False, **params)


def test_frozen_text_tower_gets_no_gradient() -> None:
    model = construct(TEXT_TOWER, cond_stage_key="txt")
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    model.shared_step(batch)[0].backward()
    assert all(parameter.grad is None for parameter in model.cond_stage_model.parameters())
    assert not model.cond_stage_model.training


def test_learned_logvar_trains(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(learn_logvar=True)
    loss, logged = model.shared_step(batch_of((2, 8, 8, 8)))
    loss.backward()
    assert model.logvar.grad.abs().sum() > 0
    assert model.trained_parameters()[-1] is model.logvar
    assert {"logvar", "train/loss_gamma"} <= set(logged)


@pytest.mark.parametrize(
    ("key", "changes", "cond"),
    [
        (None, {}, None),
        ("concat", {"in_channels": 6}, (2, 2, 8, 8)),
        ("adm", {"num_classes": 5}, "labels"),
    ],
)
def test_other_conditionings(key: str | None, changes: dict, cond: object) -> None:
    unet = {
        **case("unet_attention_block")["params"],
        "in_channels": 4,
        "out_channels": 4,
        "num_classes": None,
    } | changes
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "c"}}
    model = construct("__is_unconditional__" if key is None else dummy, unet=unet, conditioning_key=key)
    batch = {"f8": batch_of((2, 4, 8, 8))["f8"]}
    if cond == "labels":
        batch["c"] = torch.tensor([1, 4])
    elif cond is not None:
        batch["c"] = seeded_tensor("latent/map", cond)
    loss, _ = model.shared_step(batch)
    loss.backward()
    assert torch.isfinite(loss)


def test_hybrid_concatenates_and_attends() -> None:
    unet = {**case("unet_sd_tiny")["params"], "in_channels": 5}
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    model = construct(dummy, unet=unet, conditioning_key="hybrid", concat_keys=["mask"])
    batch = {**batch_of((2, 4, 8, 8)), "mask": torch.ones(2, 1, 8, 8)}
    cond = model.encode_conditioning(batch)
    assert [part.shape for part in cond["c_concat"]] == [(2, 1, 8, 8)]
    assert torch.isfinite(model.shared_step(batch)[0])


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_perfect_prediction_has_no_loss(
    make_model: Callable[..., LatentDiffusion], parameterization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(parameterization=parameterization)
    x, noise = seeded_tensor("latent/x", (2, 4, 8, 8)), seeded_tensor("latent/noise", (2, 4, 8, 8))
    t = torch.tensor([10, 900])
    a, s = model.sqrt_alphas_cumprod[t].view(2, 1, 1, 1), model.sqrt_one_minus_alphas_cumprod[t].view(2, 1, 1, 1)
    target = {"eps": noise, "x0": x, "v": a * noise - s * x}[parameterization]
    monkeypatch.setattr(model, "apply_model", lambda *args: target)
    loss, _ = model.p_losses(x, None, t, noise=noise)
    assert loss.item() < 1e-10


def test_conditioning_schedule_noises_the_conditioning() -> None:
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    model = construct(dummy, num_timesteps_cond=10)
    assert model.cond_ids[:10].tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert (model.cond_ids[10:] == 999).all()
    assert torch.isfinite(model.shared_step(batch_of((2, 4, 8, 8)))[0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"f8": (3, 8, 8)}, "posterior"),
        ({"f8": (8, 9, 8)}, "multiples"),
        ({"t5": (77, 768)}, "context_dim is 64"),
    ],
)
def test_shapes_that_do_not_fit(model: LatentDiffusion, shapes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.check_batch_shapes(shapes)


def test_shapes_that_fit(model: LatentDiffusion) -> None:
    model.check_batch_shapes({"f8": (8, 16, 8), "t5": (77, 64)})
    model.check_batch_shapes({"f8": (4, 8, 8)})


def test_log_images_keep_the_random_state_of_weights(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(use_ema=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pictures = model.log_images(batch_of((2, 8, 8, 8)), N=2, ddim_steps=5, plot_diffusion_rows=True)
    assert {"inputs", "reconstruction", "samples", "denoise_row", "diffusion_row"} == set(pictures)
    assert pictures["samples"].shape == (2, 3, 64, 64)
    assert pictures["denoise_row"].shape == (10, 3, 64, 64)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unknown_param_names_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"unknown key 'linear_strat' in params of .*LatentDiffusion.*'linear_start'"):
        construct("__is_unconditional__", linear_strat=1)


@pytest.mark.parametrize(
    "params",
    [{"parameterization": "epsilon"}, {"loss_type": "huber"}, {"conditioning_key": "cross"}, {"beta_schedule": "lin"}],
)
def test_unknown_values(params: dict) -> None:
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    with pytest.raises(UserError, match=next(iter(params.values()))):
        construct(dummy, **params)


def test_optimizer_and_schedule_by_config(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(
        optimizer_config={"target": "torch.optim.SGD", "params": {"momentum": 0.5}},
        scheduler_config={
            "target": "ldm.lr_scheduler.LambdaLinearScheduler",
            "params": {
                "warm_up_steps": [10],
                "cycle_lengths": [100],
                "f_start": [0.5],
                "f_max": [1.0],
                "f_min": [0.1],
            },
        },
    )
    model.learning_rate = 0.2
    [optimizer], [schedule] = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert schedule["interval"] == "step"


def test_no_learning_rate_is_told(model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="base_learning_rate"):
        model.configure_optimizers()


def test_weights_from_a_checkpoint(make_model: Callable[..., LatentDiffusion], tmp_path: Path) -> None:
    source = make_model()
    save_state_dict(source.state_dict(), tmp_path / "release.safetensors")
    model = make_model(use_ema=True)
    torch.nn.init.zeros_(model.model.diffusion_model.out[2].weight)
    model.init_from_ckpt(str(tmp_path / "release.safetensors"))
    weight = source.model.diffusion_model.out[2].weight
    assert torch.equal(model.model.diffusion_model.out[2].weight, weight)
    assert torch.equal(model.model_ema.get_buffer("diffusion_modelout2weight"), weight)


def test_ema_follows_optimizer_steps(make_model: Callable[..., LatentDiffusion], tmp_path: Path) -> None:
    """One update a step, not a micro-batch, and already in the checkpoint that is written at that step."""
    model = make_model(use_ema=True)
    model.learning_rate = 1e-3
    batches = [batch_of((2, 8, 8, 8)) for _ in range(4)]
    saved = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[saved],
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == 2
    assert load_state_dict(tmp_path / "last.ckpt")["model_ema.num_updates"] == 2


def test_simple_loss_is_weighted(make_model: Callable[..., LatentDiffusion]) -> None:
    x, noise, t = *(seeded_tensor(f"latent/{name}", (2, 4, 8, 8)) for name in "xn"), torch.tensor([10, 900])
    context = seeded_tensor("latent/t5", (2, 7, 64))
    plain, logged = make_model().p_losses(x, context, t, noise=noise)
    weighted, _ = make_model(l_simple_weight=0.25, original_elbo_weight=2.0).p_losses(x, context, t, noise=noise)
    assert weighted.item() == pytest.approx(0.25 * plain.item() + 2 * logged["train/loss_vlb"].item(), rel=1e-5)


def test_learned_logvar_is_logged_as_it_weighs(make_model: Callable[..., LatentDiffusion]) -> None:
    x, noise, t = *(seeded_tensor(f"latent/{name}", (2, 4, 8, 8)) for name in "xn"), torch.tensor([10, 900])
    model = make_model(learn_logvar=True)
    torch.nn.init.constant_(model.logvar, 0.5)
    _, logged = model.p_losses(x, seeded_tensor("latent/t5", (2, 7, 64)), t, noise=noise)
    expected = logged["train/loss_simple"] / torch.tensor(0.5).exp() + 0.5
    torch.testing.assert_close(logged["train/loss_gamma"], expected, rtol=1e-4, atol=1e-5)


def validated(model: LatentDiffusion, batch: dict, batch_idx: int) -> dict[str, float]:
    """What a validation step logs."""
    logged: dict[str, float] = {}
    model.log_dict = lambda values, **_: logged.update({key: value.item() for key, value in values.items()})
    model.eval()
    with torch.no_grad():
        model.validation_step(batch, batch_idx)
    return logged


def test_validation_repeats_its_noise_and_leaves_training_its_own(model: LatentDiffusion) -> None:
    batch = batch_of((2, 8, 8, 8))
    torch.manual_seed(5)
    first = validated(model, batch, 0)
    drawn = torch.rand(1)
    assert validated(model, batch, 0) == first
    assert validated(model, batch, 1) != first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert first["val/loss_simple_ema"] == first["val/loss_simple"]


def test_validation_with_an_average(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(use_ema=True)  # the average is of the weights before they were filled
    logged = validated(model, batch_of((2, 8, 8, 8)), 0)
    assert logged["val/loss_simple_ema"] != logged["val/loss_simple"]


def test_scale_from_the_first_batch(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(scale_by_std=True)
    model._trainer = type("Trainer", (), {"global_step": 0})()  # `global_step` is the trainer's
    batch = {**batch_of((2, 4, 8, 8)), "f8": 3 * batch_of((2, 4, 8, 8))["f8"]}
    model.on_train_batch_start(batch, 0)
    assert model.get_first_stage_encoding(model.encode_batch(batch)).std().item() == pytest.approx(1.0, abs=1e-4)
    assert "scale_factor" in model.state_dict()


def test_concatenated_maps_come_after_the_input() -> None:
    unet = {"target": "torch.nn.Identity"}
    wrapper = DiffusionWrapper(unet, "concat")
    wrapper.diffusion_model.forward = lambda x, t: x
    x, extra = torch.zeros(1, 4, 2, 2), torch.ones(1, 2, 2, 2)
    assert wrapper(x, torch.tensor([1]), c_concat=[extra])[0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]


def test_pictures_are_of_the_average(make_model: Callable[..., LatentDiffusion]) -> None:
    batch = batch_of((2, 8, 8, 8))
    pictures = []
    for use_ema in (False, True):  # the average is of the weights before they were filled
        torch.manual_seed(0)
        model = make_model(use_ema=use_ema)
        torch.manual_seed(0)
        pictures.append(model.log_images(batch, ddim_steps=2, plot_denoise_rows=False)["samples"])
    assert not torch.equal(*pictures)


def test_guided_pictures_of_captions() -> None:
    model = construct(TEXT_TOWER, cond_stage_key="txt")
    fill_seeded(model)
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    pictures = model.log_images(batch, ddim_steps=2, plot_denoise_rows=False, unconditional_guidance_scale=9.0)
    assert not torch.allclose(pictures["samples_cfg_scale_9.00"], pictures["samples"], atol=0.01)


def test_test_losses_have_names_of_their_own(model: LatentDiffusion) -> None:
    logged: dict[str, torch.Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)
    model.eval()
    with torch.no_grad():
        model.test_step(batch_of((2, 8, 8, 8)), 0)
    assert {key.split("/")[0] for key in logged} == {"test"}


def test_casting_keeps_the_schedule_and_the_average(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(use_ema=True, learn_logvar=True).bfloat16()
    assert model.model.diffusion_model.out[2].weight.dtype == torch.bfloat16
    assert model.logvar.dtype == torch.float32 and model.logvar.requires_grad
    assert model.alphas_cumprod.dtype == torch.float32
    assert len(model.alphas_cumprod.unique()) == 1000
    assert model.model_ema.decay == torch.tensor(0.9999)
    assert model.model_ema.get_buffer("diffusion_modelout2weight").dtype == torch.float32
    loss, _ = model.shared_step(batch_of((2, 8, 8, 8)))
    assert torch.isfinite(loss)


def test_averaged_weights_within_averaged_weights(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(use_ema=True)
    raw = model.model.diffusion_model.out[2].weight.clone()
    with model.ema_scope():
        averaged = model.model.diffusion_model.out[2].weight.clone()
        with model.ema_scope():
            assert torch.equal(model.model.diffusion_model.out[2].weight, averaged)
        assert torch.equal(model.model.diffusion_model.out[2].weight, averaged)
    assert torch.equal(model.model.diffusion_model.out[2].weight, raw)
    assert not torch.equal(averaged, raw)


def test_a_missing_batch_entry_is_named(model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="'f8'; the data give 'image'"):
        model.shared_step({"image": torch.zeros(2, 64, 64, 3)})


def test_hybrid_needs_maps() -> None:
    with pytest.raises(UserError, match="concat_keys"):
        construct(TEXT_TOWER, conditioning_key="hybrid")


def test_images_without_three_channels_are_images() -> None:
    unet = {**case("unet_sd_tiny")["params"], "in_channels": 1, "out_channels": 1}
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    model = construct(dummy, unet=unet, first_stage_config=identity, channels=1, image_size=16)
    for shape in ((2, 16, 16, 1), (2, 16, 16)):
        batch = {"f8": torch.zeros(shape), "t5": batch_of((2, 8, 8, 8))["t5"]}
        assert model.encode_batch(batch).shape == (2, 1, 16, 16)
        assert torch.isfinite(model.shared_step(batch)[0])


def test_a_narrow_latent_is_no_image(model: LatentDiffusion) -> None:
    assert model.encode_batch({"f8": torch.zeros(2, 4, 8, 3)}).shape == (2, 4, 8, 3)


def test_a_loaded_scale_stays(make_model: Callable[..., LatentDiffusion], tmp_path: Path) -> None:
    save_state_dict(make_model(scale_by_std=True, scale_factor=0.37).state_dict(), tmp_path / "scaled.ckpt")
    model = make_model(scale_by_std=True)
    model.init_from_ckpt(str(tmp_path / "scaled.ckpt"))
    model._trainer = type("Trainer", (), {"global_step": 0})()
    model.on_train_batch_start(batch_of((2, 4, 8, 8)), 0)
    assert model.scale_factor.item() == pytest.approx(0.37)


@pytest.mark.parametrize("kwargs", [{"N": 2, "use_ema_scope": False, "inpaint": False, "plot_progressive_rows": False}])
def test_picture_settings_of_2022(model: LatentDiffusion, kwargs: dict) -> None:
    batch = batch_of((4, 8, 8, 8))
    assert model.log_images(batch, ddim_steps=2, **kwargs)["samples"].shape == (2, 3, 64, 64)


def test_stored_half_precision_under_bfloat16_autocast(model: LatentDiffusion) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.shared_step(batch_of((2, 8, 8, 8)))
    loss.backward()
    assert torch.isfinite(loss)
