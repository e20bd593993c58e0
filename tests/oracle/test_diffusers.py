"""An independent implementation, diffusers, opens our files through its own key conversion and agrees with us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ldm.checkpoint import save_state_dict
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import Sampler
from tests.golden_data import case, relative_error, seeded_tensor
from tests.ldm.models.diffusion.conftest import build

# The tiny models of the golden cases in diffusers' words. Its `attention_head_dim` is the number of heads here.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 128, 128],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "sample_size": 64,
    "block_out_channels": [32, 64, 128, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build(case("loss_eps")["params"]).eval()


@pytest.fixture(scope="module", params=["safetensors", "ckpt"])
def release(request: pytest.FixtureRequest, model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / f"tiny.{request.param}"
    save_state_dict(model.state_dict(), path)
    return path


def opened(cls: type, release: Path, config: dict[str, Any]) -> torch.nn.Module:
    folder = release.parent / cls.__name__
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return cls.from_single_file(str(release), config=str(folder), local_files_only=True).eval()


@torch.no_grad()
def test_unet(model: LatentDiffusion, release: Path) -> None:
    theirs = opened(diffusers.UNet2DConditionModel, release, UNET)
    x, context = seeded_tensor("oracle/x", (2, 4, 16, 16)), seeded_tensor("oracle/context", (2, 7, 64))
    t = torch.tensor([3, 731])
    reference = theirs(x, t, encoder_hidden_states=context).sample
    assert relative_error(model.apply_model(x, t, context), reference) < 1e-5


@torch.no_grad()
def test_autoencoder(model: LatentDiffusion, release: Path) -> None:
    theirs = opened(diffusers.AutoencoderKL, release, VAE)
    image = seeded_tensor("oracle/image", (2, 3, 64, 64), 0.5).clamp(-1, 1)
    posterior = model.first_stage_model.encode(image)
    assert relative_error(posterior.parameters, theirs.encode(image).latent_dist.parameters) < 1e-5
    z = posterior.mode()
    assert relative_error(model.first_stage_model.decode(z), theirs.decode(z).sample) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("steps", [4, 10, 20])
@pytest.mark.parametrize("kind", ["ddim", "plms", "dpm_solver"])
def test_sampler_steps(model: LatentDiffusion, kind: str, steps: int) -> None:
    """Every step, so that a failure names the first one that differs."""
    if kind == "ddim":
        scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        sampler = DDIMSampler(model)
    elif kind == "plms":
        scheduler = diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
        sampler = PLMSSampler(model)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="sigma_min"
        )
        sampler = DPMSolverSampler(model)
    context, x_T = seeded_tensor("oracle/context", (2, 7, 64)), seeded_tensor("oracle/x_T", (2, 4, 8, 8))
    scheduler.set_timesteps(steps)
    if kind == "dpm_solver":
        # Theirs rounds times to training timesteps; give both the same, whole ones.
        sampler.make_schedule(steps)
        times = sampler.timesteps.round()
        levels = sampler.alphas_cumprod[times.astype(int)]
        sampler.make_schedule = lambda *args, **kwargs: None
        sampler.timesteps, sampler.alphas = times, levels
        sampler.alphas_prev = [*levels[1:], sampler.alphas_cumprod[0]]
        scheduler.timesteps = torch.from_numpy(times.astype(int).copy())
        sigmas = [((1 - level) / level) ** 0.5 for level in sampler.alphas] + [
            ((1 - sampler.alphas_prev[-1]) / sampler.alphas_prev[-1]) ** 0.5
        ]
        scheduler.sigmas = torch.tensor(sigmas)
    reference, states = x_T, []
    for t in scheduler.timesteps:
        prediction = model.apply_model(reference, t.expand(2), context)
        reference = scheduler.step(prediction, t, reference).prev_sample
        states.append(reference)
    if kind == "plms":
        del states[0]  # the Euler pair counts as two of their steps
    _, intermediates = sampler.sample(steps, 2, (4, 8, 8), conditioning=context, x_T=x_T, log_every_t=1, verbose=False)
    assert len(intermediates["x_inter"]) == len(states) + 1
    for step, (ours, theirs) in enumerate(zip(intermediates["x_inter"][1:], states, strict=True)):
        assert relative_error(ours, theirs) < 1e-4, f"step {step}"


def fixed(sampler: Sampler, steps: int, spacing: str, times: torch.Tensor | None = None) -> Sampler:
    """Return the sampler with the steps of a spacing, and other model times if given."""
    sampler.make_schedule(steps, spacing)
    if times is not None:
        sampler.timesteps = times.double().numpy()
    sampler.make_schedule = lambda *args, **kwargs: None
    return sampler


def compared(model: LatentDiffusion, sampler: Sampler, steps: int, states: list[torch.Tensor], last: float) -> None:
    """Compare each step's x with those of diffusers."""
    context, x_T = seeded_tensor("oracle/context", (2, 7, 64)), seeded_tensor("oracle/x_T", (2, 4, 8, 8))
    _, intermediates = sampler.sample(steps, 2, (4, 8, 8), conditioning=context, x_T=x_T, log_every_t=1, verbose=False)
    assert sampler.alphas_prev[-1] == pytest.approx(last)
    for step, (ours, theirs) in enumerate(zip(intermediates["x_inter"][1:], states, strict=True)):
        assert relative_error(ours, theirs) < 1e-4, f"step {step}"


@torch.no_grad()
def test_trailing_steps_at_zero_terminal_snr() -> None:
    """v-prediction from the timestep without signal on."""
    model = build(case("loss_eps")["params"] | {"parameterization": "v", "rescale_betas_zero_snr": True}).eval()
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True, prediction_type="v_prediction",
    )  # fmt: skip
    context, x = seeded_tensor("oracle/context", (2, 7, 64)), seeded_tensor("oracle/x_T", (2, 4, 8, 8))
    scheduler.set_timesteps(8)  # divides 1000: else theirs steps to ⌊1000 / S⌋ below, not to the next timestep
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(model.apply_model(x, t.expand(2), context), t, x).prev_sample
        states.append(x)
    compared(model, DDIMSampler(model), 8, states, model.alphas_cumprod[0].item())


@torch.no_grad()
def test_karras_steps_of_ddim_are_those_of_euler(model: LatentDiffusion) -> None:
    """Theirs is in x / √ᾱ, where DDIM is Euler's method in σ (arXiv:2206.00364, appendix C)."""
    scheduler, sampler = diffusers.EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=True), DDIMSampler(model)
    scheduler.set_timesteps(10)
    fixed(sampler, 10, "karras")
    scheduler.timesteps = torch.from_numpy(sampler.timesteps.astype("float32"))
    context, x = seeded_tensor("oracle/context", (2, 7, 64)), seeded_tensor("oracle/x_T", (2, 4, 8, 8))
    x = x / sampler.alphas[0] ** 0.5
    states = []
    for t, after in zip(scheduler.timesteps, sampler.alphas_prev, strict=True):
        prediction = model.apply_model(scheduler.scale_model_input(x, t), t.expand(2), context)
        x = scheduler.step(prediction, t, x).prev_sample
        states.append(x * after**0.5)
    compared(model, sampler, 10, states, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("steps", [8, 20])
def test_karras_steps_of_dpm_solver(model: LatentDiffusion, steps: int) -> None:
    """Theirs rounds times to training timesteps; both get those."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    sampler = fixed(DPMSolverSampler(model), steps, "karras", scheduler.timesteps)
    context, x = seeded_tensor("oracle/context", (2, 7, 64)), seeded_tensor("oracle/x_T", (2, 4, 8, 8))
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(model.apply_model(x, t.expand(2), context), t, x).prev_sample
        states.append(x)
    compared(model, sampler, steps, states, 1.0)
