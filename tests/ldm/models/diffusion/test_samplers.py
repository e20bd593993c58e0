"""The samplers against the golden case, and on a model that knows the answer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import rescaled
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.samplers import SAMPLERS as TABLE
from ldm.models.diffusion.samplers import sampler_class
from ldm.models.diffusion.sampling import NotFiniteError
from ldm.models.diffusion.spacing import SPACINGS
from ldm.modules.diffusionmodules.schedule import (
    diffusion_buffers,
    make_beta_schedule,
    make_ddim_timesteps,
    rescale_to_zero_snr,
)
from ldm.util import UserError
from tests.golden_data import case, cases, relative_error, seeded_tensor, tensors

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
SHAPE = (4, 8, 8)
BUFFERS = diffusion_buffers(make_beta_schedule("linear", 1000, 0.00085, 0.012))
ALPHA_BAR = torch.tensor(BUFFERS["alphas_cumprod"], dtype=torch.float32)


def test_sampler_class_imports_each_of_the_table() -> None:
    assert {name: sampler_class(name) for name in TABLE} == SAMPLERS


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", cases("sampler"))
def test_golden(name: str, sampler: str, model: LatentDiffusion) -> None:
    spec = case(name)
    samples, _ = SAMPLERS[sampler](model).sample(
        S=spec["steps"],
        batch_size=2,
        shape=spec["shape"],
        conditioning=seeded_tensor(f"{name}/context", (2, 7, 64)),
        unconditional_conditioning=seeded_tensor(f"{name}/uncond", (2, 7, 64)),
        unconditional_guidance_scale=spec["unconditional_guidance_scale"],
        eta=spec["eta"],
        x_T=seeded_tensor(f"{name}/x_T", (2, *spec["shape"])),
        verbose=False,
    )
    assert relative_error(samples, tensors("cases")[f"{name}/{sampler}"]) < 1e-4


class Oracle:
    """Denoiser for data that is one image. Its predictions are exact in each parameterization.

    Under a conditioning `c` the image is `target + c`.
    """

    num_timesteps = 1000
    alphas_cumprod = ALPHA_BAR

    def __init__(self, target: Tensor, parameterization: str = "eps") -> None:
        self.target = target
        self.parameterization = parameterization
        self.batches: list[int] = []

    def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.batches.append(len(x))
        shift = cond["c_crossattn"][0] if isinstance(cond, dict) else cond[0] if isinstance(cond, list) else cond
        x0 = self.target if cond is None else self.target + shift
        levels = np.interp(t.double().numpy(), np.arange(1000), np.log(BUFFERS["alphas_cumprod"]))
        alpha_bar = torch.from_numpy(np.exp(levels)).float().view(-1, 1, 1, 1)
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
        return {"eps": eps, "x0": x0.expand_as(x), "v": v}[self.parameterization]


@pytest.fixture
def target() -> Tensor:
    return seeded_tensor("sampler/target", (1, *SHAPE))


def run(sampler: type, model: Oracle, **settings: object) -> Tensor:
    settings = {"S": 10, "batch_size": 2, "shape": SHAPE, "verbose": False} | settings
    settings.setdefault("x_T", seeded_tensor("sampler/x_T", (settings["batch_size"], *SHAPE)))
    return sampler(model).sample(**settings)[0]


def at_the_end(target: Tensor, noise: Tensor) -> Tensor:
    """Return the sample of `noise` and the target at the least noisy level, at which the samplers stop."""
    return ALPHA_BAR[0].sqrt() * target + (1 - ALPHA_BAR[0]).sqrt() * noise


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_predictions_lead_to_the_image(sampler: str, parameterization: str, target: Tensor) -> None:
    x_T = seeded_tensor("sampler/x_T", (2, *SHAPE))
    samples = run(SAMPLERS[sampler], Oracle(target, parameterization), x_T=x_T)
    # The deterministic path keeps the noise that it began with, since the predictions are those of one image.
    first = {"ddim": 901, "plms": 901, "dpm_solver": 999}[sampler]
    noise = (x_T - ALPHA_BAR[first].sqrt() * target) / (1 - ALPHA_BAR[first]).sqrt()
    torch.testing.assert_close(samples, at_the_end(target, noise), atol=2e-3, rtol=1e-3)


def test_eta_adds_the_noise_that_it_takes_away(target: Tensor) -> None:
    """Eq. 12 keeps the marginals: at any eta the last level's noise is standard normal."""
    x_T = torch.randn(512, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    samples = run(DDIMSampler, Oracle(target), batch_size=512, x_T=x_T, eta=1.0)
    noise = (samples - ALPHA_BAR[0].sqrt() * target) / (1 - ALPHA_BAR[0]).sqrt()
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)


def test_temperature_scales_the_noise(target: Tensor) -> None:
    torch.manual_seed(0)
    warm, cold = run(DDIMSampler, Oracle(target), eta=1.0), run(DDIMSampler, Oracle(target), eta=1.0, temperature=0.0)
    assert torch.equal(cold, run(DDIMSampler, Oracle(target), eta=1.0, temperature=0.0))
    assert not torch.allclose(warm, cold)


def test_guidance_moves_away_from_the_unconditional(target: Tensor) -> None:
    cond, uncond = torch.full((2, *SHAPE), 0.5), torch.full((2, *SHAPE), -0.5)
    model = Oracle(target, "x0")
    guided = run(
        DDIMSampler, model, conditioning=cond, unconditional_conditioning=uncond, unconditional_guidance_scale=3.0
    )
    aimed = Oracle(target - 0.5 + 3.0, "x0")  # uncond + 3 (cond - uncond)
    torch.testing.assert_close(guided, run(DDIMSampler, aimed), atol=1e-4, rtol=1e-4)
    assert set(model.batches) == {4}


def test_scale_one_asks_once(target: Tensor) -> None:
    model = Oracle(target)
    run(DDIMSampler, model, conditioning=torch.ones(2, *SHAPE), unconditional_conditioning=torch.zeros(2, *SHAPE))
    assert set(model.batches) == {2}


@pytest.mark.parametrize("wrap", [lambda c: [c], lambda c: {"c_crossattn": [c]}], ids=["list", "dict"])
def test_conditioning_of_any_form(target: Tensor, wrap) -> None:
    cond, uncond = torch.full((2, *SHAPE), 0.5), torch.zeros(2, *SHAPE)
    plain = run(DDIMSampler, Oracle(target), conditioning=cond, unconditional_conditioning=uncond,
                unconditional_guidance_scale=2.0)  # fmt: skip
    wrapped = run(DDIMSampler, Oracle(target), conditioning=wrap(cond), unconditional_conditioning=wrap(uncond),
                  unconditional_guidance_scale=2.0)  # fmt: skip
    assert torch.equal(plain, wrapped)


def test_mask_keeps_the_given_latents(target: Tensor) -> None:
    """Under the mask, x at each step is the given latent at that step's noise; elsewhere it is the sample's own."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    kept = torch.full((2, *SHAPE), 2.0)
    seen: list[Tensor] = []
    model = Oracle(target)
    inner = model.apply_model

    def apply_model(x: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.append(x)
        return inner(x, t, cond)

    model.apply_model = apply_model
    torch.manual_seed(0)
    run(DDIMSampler, model, batch_size=2, mask=mask, x0=kept)
    last = seen[-1][..., :4]  # at timestep 1
    assert last.mean().item() == pytest.approx(2.0 * ALPHA_BAR[1].sqrt().item(), abs=0.02)
    free = run(DDIMSampler, Oracle(target))
    torch.testing.assert_close(run(DDIMSampler, Oracle(target), mask=mask, x0=kept)[..., 4:], free[..., 4:])


def test_mask_without_latents(target: Tensor) -> None:
    with pytest.raises(UserError, match="x0"):
        run(DDIMSampler, Oracle(target), mask=torch.ones(1, 1, 8, 8))


def test_callbacks_and_intermediates(target: Tensor) -> None:
    indices: list[int] = []
    predicted: list[Tensor] = []
    _, intermediates = DDIMSampler(Oracle(target)).sample(
        10, 1, SHAPE, verbose=False, log_every_t=5, callback=indices.append,
        img_callback=lambda x0, index: predicted.append(x0),
    )  # fmt: skip
    assert indices == list(range(10))
    torch.testing.assert_close(predicted[3], target, atol=1e-4, rtol=1e-3)
    assert len(intermediates["x_inter"]) == len(intermediates["pred_x0"]) == 3  # the start, and every fifth


def test_timesteps() -> None:
    assert make_ddim_timesteps("uniform", 5, 1000).tolist() == case("samplers_5")["ddim_timesteps"]
    assert make_ddim_timesteps("uniform", 1000, 1000)[-1] == 999
    quad = make_ddim_timesteps("quad", 4, 1000)
    assert quad.tolist() == [1, 89, 356, 801]  # squares of thirds of sqrt(800), rounded down, plus 1
    with pytest.raises(UserError, match="cubic"):
        make_ddim_timesteps("cubic", 5, 1000)


def test_ancestral_steps_are_draws_from_the_posterior(model: LatentDiffusion, target: Tensor) -> None:
    sampler = AncestralSampler(model)
    sampler.make_schedule(1000)
    x, noise = seeded_tensor("sampler/x", (1, *SHAPE)), seeded_tensor("sampler/noise", (1, *SHAPE))
    index = 400  # timestep 599
    prediction = SimpleNamespace(x0=target)
    stepped, _ = sampler.step(x, index, lambda *_: prediction, lambda: noise)
    beta = 1 - BUFFERS["alphas_cumprod"][599] / BUFFERS["alphas_cumprod"][598]
    previous = BUFFERS["alphas_cumprod"][598]
    rest = 1 - BUFFERS["alphas_cumprod"][599]
    mean = previous**0.5 * beta / rest * target + (1 - beta) ** 0.5 * (1 - previous) / rest * x  # eq. 7
    variance = (1 - previous) / rest * beta
    torch.testing.assert_close(stepped, mean + variance**0.5 * noise, atol=1e-5, rtol=1e-4)
    last, _ = sampler.step(x, 999, lambda *_: prediction, lambda: noise)
    torch.testing.assert_close(last, target)  # nothing is added after timestep 0


def test_ancestral_clips_pixels(model: LatentDiffusion) -> None:
    sampler = AncestralSampler(model, clip_denoised=True)
    sampler.make_schedule(1000)
    x = torch.zeros(1, *SHAPE)
    _, x0 = sampler.step(x, 999, lambda *_: SimpleNamespace(x0=x + 3), lambda: x)
    assert (x0 == 1).all()


def test_ancestral_sampling_of_a_model(model: LatentDiffusion) -> None:
    """Latents are not clipped, and the number of steps is checked."""
    samples = model.sample(
        2, cond=seeded_tensor("sampler/context", (2, 7, 64)), timesteps=3, x_T=3 * torch.ones(2, *SHAPE)
    )
    assert samples.shape == (2, *SHAPE)
    assert samples.abs().max() > 1
    with pytest.raises(UserError, match="sampling steps 2000"):
        model.sample(2, timesteps=2000)


class Broken(Oracle):
    """An oracle that predicts NaN for row 1 from its fourth prediction on."""

    def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        output = super().apply_model(x, t, cond).clone()
        if len(self.batches) > 3:
            output[1] = float("nan")
        return output


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_not_finite_samples_are_named_by_step_and_row(target: Tensor, sampler: str) -> None:
    with pytest.raises(NotFiniteError, match=r"NaN or infinities from step 4 of 10 on; .*--precision fp32") as caught:
        run(SAMPLERS[sampler], Broken(target))
    assert caught.value.row == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_keeps_what_little_noise_leaves(target: Tensor, sampler: str) -> None:
    """The more of the steps run, the nearer a sample comes to the model's own image, and the farther from `init`."""
    init = target.expand(2, *SHAPE) + 1.0
    distances = []
    for strength in (0.1, 0.5, 1.0):
        model = Oracle(target)
        samples = run(SAMPLERS[sampler], model, init=init, strength=strength)
        assert len(model.batches) == round(strength * 10) + (sampler == "plms")
        distances.append((samples - target).abs().mean().item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.1


@pytest.mark.parametrize("strength", [0, -0.5, 1.5])
def test_impossible_strength(target: Tensor, strength: float) -> None:
    with pytest.raises(UserError, match=f"strength {strength}: give a number above 0, up to 1"):
        run(DDIMSampler, Oracle(target), init=target, strength=strength)


def test_init_is_noised_for_the_first_step_that_runs(target: Tensor) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    model = Oracle(target)
    inner = model.apply_model
    model.apply_model = lambda x, t, cond: seen.append((x, t)) or inner(x, t, cond)
    noise, init = seeded_tensor("sampler/x_T", (2, *SHAPE)), torch.full((2, *SHAPE), 2.0)
    run(DDIMSampler, model, init=init, strength=0.3, x_T=noise)
    x, t = seen[0]
    assert t.tolist() == [201, 201]
    torch.testing.assert_close(x, ALPHA_BAR[201].sqrt() * init + (1 - ALPHA_BAR[201]).sqrt() * noise)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_is_sampled(sampler: str, target: Tensor) -> None:
    """With v predicted, sampling begins at the very end, where x is noise alone: the next x has the predicted x0."""
    rescaled = diffusion_buffers(rescale_to_zero_snr(make_beta_schedule("linear", 1000, 0.00085, 0.012)))
    alpha_bar = torch.tensor(rescaled["alphas_cumprod"], dtype=torch.float32)

    class Rescaled(Oracle):
        alphas_cumprod = alpha_bar

        def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
            visited.append(t[0].item())
            level = alpha_bar[t.long()].view(-1, 1, 1, 1)
            eps = (x - level.sqrt() * self.target) / (1 - level).sqrt()
            return level.sqrt() * eps - (1 - level).sqrt() * self.target

    visited: list[float] = []
    samples = run(SAMPLERS[sampler], Rescaled(target, "v"), S=10)
    assert visited[:2] == [999, 899] and visited[-1] == 99
    x_T = seeded_tensor("sampler/x_T", (2, *SHAPE))  # all of it noise
    expected = alpha_bar[0].sqrt() * target + (1 - alpha_bar[0]).sqrt() * x_T
    torch.testing.assert_close(samples, expected, atol=5e-3, rtol=1e-3)
    with pytest.raises(UserError, match=r"spacing trailing: it starts at zero SNR, .* set parameterization to v"):
        run(SAMPLERS[sampler], Rescaled(target, "eps"), spacing="trailing")
    visited.clear()
    run(SAMPLERS[sampler], Rescaled(target, "eps"))
    assert visited[0] == 901


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_spacing_leads_to_the_image(sampler: str, spacing: str, target: Tensor) -> None:
    """Exact predictions end at the image, at the noise level that the spacing ends with."""
    model = Oracle(target)
    if (sampler, spacing) == ("plms", "karras"):
        with pytest.raises(UserError, match="spacing karras: PLMS needs equal steps"):
            run(PLMSSampler, model, spacing=spacing)
        return
    drawer, x_T = SAMPLERS[sampler](model), seeded_tensor("sampler/x_T", (2, *SHAPE))
    drawer.make_schedule(10, spacing)
    first, last = torch.tensor(drawer.alphas[0]), torch.tensor(drawer.alphas_prev[-1])
    assert last == (1.0 if spacing == "karras" else ALPHA_BAR[0])
    noise = (x_T - first.sqrt() * target) / (1 - first).sqrt()
    samples = run(SAMPLERS[sampler], Oracle(target), spacing=spacing, x_T=x_T)
    expected = last.sqrt() * target + (1 - last).sqrt() * noise
    torch.testing.assert_close(samples, expected.float(), atol=2e-3, rtol=1e-3)


def test_dpm_solver_takes_steps_of_no_length(target: Tensor) -> None:
    """With all 1000 timesteps a spacing ends where the schedule begins: two steps have one time."""
    for spacing in ("leading", "trailing"):
        assert run(DPMSolverSampler, Oracle(target), S=1000, spacing=spacing).isfinite().all()


def test_guidance_rescale_gives_the_deviation_of_the_conditional() -> None:
    guided, cond = seeded_tensor("rescale/guided", (2, *SHAPE)), seeded_tensor("rescale/cond", (2, *SHAPE), 0.25)
    whole, half = rescaled(guided, cond, 1.0), rescaled(guided, cond, 0.5)
    for row in range(2):  # eq. 15, per sample
        torch.testing.assert_close(whole[row], guided[row] * (cond[row].std() / guided[row].std()))
    torch.testing.assert_close(half, (whole + guided) / 2)  # eq. 16
    assert rescaled(guided, cond, 0.0) is guided
    theirs = rescale_noise_cfg(guided, cond, guidance_rescale=0.7)
    torch.testing.assert_close(rescaled(guided, cond, 0.7), theirs)


def test_guidance_rescale_is_applied_in_sampling(target: Tensor) -> None:
    cond, uncond = seeded_tensor("rescale/c", (2, *SHAPE)), seeded_tensor("rescale/u", (2, *SHAPE))
    both = {"conditioning": cond, "unconditional_conditioning": uncond, "S": 1}
    plain = run(DDIMSampler, Oracle(target, "x0"), **both)
    guided = run(DDIMSampler, Oracle(target, "x0"), **both, unconditional_guidance_scale=5.0, guidance_rescale=1.0)
    x_T, first = seeded_tensor("sampler/x_T", (2, *SHAPE)), ALPHA_BAR[1]

    def predicted(sample: Tensor) -> Tensor:  # of a step from timestep 1 to 0
        slope = ((1 - ALPHA_BAR[0]) / (1 - first)).sqrt()
        return (sample - slope * x_T) / (ALPHA_BAR[0].sqrt() - slope * first.sqrt())

    deviations = [predicted(sample).flatten(1).std(1) for sample in (plain, guided)]
    torch.testing.assert_close(*deviations, rtol=1e-2, atol=0)


def test_image_guidance_scale_needs_an_image(target: Tensor) -> None:
    cond = torch.zeros(2, *SHAPE)
    with pytest.raises(UserError, match=r"image guidance scale 1\.5: this model is not conditioned on an image"):
        run(DDIMSampler, Oracle(target), conditioning=cond, unconditional_conditioning=cond, image_guidance_scale=1.5)


def test_both_public_paths_of_the_dpm_solver() -> None:
    from ldm.models.diffusion.dpm_solver import sampler

    assert sampler.DPMSolverSampler is DPMSolverSampler
