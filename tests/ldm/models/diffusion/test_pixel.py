"""Tests of diffusion in pixel space: loss, initial weights, optimizer, average and validation."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.util import UserError, get_obj_from_str
from tests.golden_data import case, seeded_tensor
from tests.ldm.models.diffusion.conftest import batch_of, construct


def test_learned_logvar_trains(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(learn_logvar=True)
    loss, logged = model.shared_step(batch_of((2, 8, 8, 8)))
    loss.backward()
    assert model.logvar.grad.abs().sum() > 0
    assert model.trained_parameters()[-1] is model.logvar
    assert {"logvar", "train/loss_gamma"} <= set(logged)


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


@pytest.mark.slow
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
    """Return the values that a validation step logs."""
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


def test_validation_of_named_samples_does_not_depend_on_their_batch(model: LatentDiffusion) -> None:
    batch = {**batch_of((2, 8, 8, 8)), "stream": list("ab"), "quantile": torch.tensor([0.12, 0.999999999])}
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    whole, alone = validated(model, batch, 0), [validated(model, row, number) for number, row in enumerate(rows)]
    mean = sum(logged["val/loss_simple"] for logged in alone) / 2
    assert whole["val/loss_simple"] == pytest.approx(mean, rel=1e-5)
    validated(model, batch, 0)
    assert model.sample_losses[0].tolist() == [int(0.12 * model.num_timesteps), model.num_timesteps - 1]


def test_validation_with_an_average(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(use_ema=True)  # the average is of the weights before they were filled
    logged = validated(model, batch_of((2, 8, 8, 8)), 0)
    assert logged["val/loss_simple_ema"] != logged["val/loss_simple"]


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


@pytest.mark.parametrize("target", ["ddpm.LatentDiffusion", "ddpm.LatentInpaintDiffusion", "ddpm_edit.LatentDiffusion"])
@pytest.mark.parametrize("method", ["p_losses", "forward", "shared_step"])
def test_signatures_of_p_losses_forward_and_shared_step_are_those_of_ddpm(target: str, method: str) -> None:
    subclass = get_obj_from_str(f"ldm.models.diffusion.{target}")
    assert signature(getattr(subclass, method)) == signature(getattr(DDPM, method))


def test_ddpm_of_pixels_trains_and_shows_images() -> None:
    """The base answers for itself what `LatentDiffusion` answers otherwise."""
    unet = {**case("unet_attention_block")["params"], "in_channels": 3, "out_channels": 3, "num_classes": None}
    config = {"target": case("unet_attention_block")["target"], "params": unet}
    model = DDPM(config, image_size=16, timesteps=20, min_snr_gamma=5, use_ema=False)
    batch = {"image": seeded_tensor("base/image", (2, 16, 16, 3))}
    loss, logged = model.shared_step(batch)
    loss.backward()
    assert set(logged) == {"train/loss_simple", "train/loss_vlb", "train/loss"}
    images = model.log_images(batch, ddim_steps=2, unconditional_guidance_scale=3.0)
    assert set(images) == {"inputs", "reconstruction", "samples", "denoise_row"}
    assert torch.equal(images["inputs"], batch["image"].permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheduler_config": {"target": "torch.nn.Identity"}}, "scheduler_config: torch.nn.Identity is no multiplier"),
        ({"scheduler_config": {"target": "x.y"}}, "scheduler_config: target 'x.y': no module named 'x'"),
        (
            {"optimizer_config": {"target": "torch.optim.AdamW", "params": {"betas": [0.9]}}},
            "optimizer_config: torch.optim.AdamW: list index out of range",
        ),
    ],
)
def test_optimizers_and_schedules_that_cannot_be_built_are_one_line(
    make_model: Callable[..., LatentDiffusion], changes: dict, said: str
) -> None:
    model = make_model(**changes)
    model.learning_rate = 1e-4
    with pytest.raises(UserError, match=said):
        model.configure_optimizers()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale_factor": 0}, "scale_factor 0: give a number above 0"),
        ({"scale_factor": float("nan")}, "scale_factor=nan in params of .*: is not a number; give a number"),
        ({"log_every_t": 0}, "log_every_t 0: give a whole number of at least 1"),
        (
            {"unet_config": {"target": "torch.nn.Identity"}, "first_stage_config": None},
            "first_stage_config=None in params",
        ),
    ],
)
def test_values_that_make_no_model_are_one_line(
    make_model: Callable[..., LatentDiffusion], changes: dict, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_model(**changes)
