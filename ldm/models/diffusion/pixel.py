"""Diffusion of images in pixel space as a Lightning module, and base of latent diffusion.

B: batch. C, H, W: channels, height and width of the diffused tensor. t (B,): timesteps, counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor

from ldm.checkpoint.keys import PREDICTION
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.batch_mean import EQUAL, BatchMean
from ldm.models.diffusion.conditioning_dropout import replacements_of
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.initial_weights import InitialWeights
from ldm.models.diffusion.log_images import log_images
from ldm.models.diffusion.loss_keys import weighting_of
from ldm.models.diffusion.noise import PLAIN_NOISE, noise_of
from ldm.models.diffusion.random_streams import GLOBAL_STREAM, RandomStreams
from ldm.models.diffusion.timesteps import STATE as TIMESTEP_STATE
from ldm.models.diffusion.timesteps import distribution_of
from ldm.models.diffusion.training_steps import TrainingSteps
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.diffusionmodules.layers import KeepsTypes
from ldm.modules.diffusionmodules.schedule import PARAMETERIZATIONS, GaussianDiffusion
from ldm.modules.ema import LitEma
from ldm.util import check_choice, check_number

LOSS_TYPES = ("l1", "l2")


class DDPM(TrainingSteps, InitialWeights, GaussianDiffusion, KeepsTypes, pl.LightningModule):
    """Denoising diffusion of images (arXiv:2006.11239).

    Args:
        unet_config: `target` and `params` of the UNet.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s: noise schedule; see `make_beta_schedule`.
        given_betas: the values of β, in place of a named schedule.
        rescale_betas_zero_snr: see `rescale_to_zero_snr`. It requires `v` or `x0`.
        loss_type: `l1` or `l2`.
        ckpt_path, ignore_keys: checkpoint of the initial weights, and prefixes of the keys to skip.
        load_only_unet: load only the UNet from `ckpt_path`.
        load_ema, reset_ema: load the moving average of the file, or restart it at the loaded weights.
        reset_num_ema_updates: reset the number of updates, so that the average follows quickly at first.
        make_it_fit: repeat a tensor of the file to fill a larger tensor of the model.
        ucg_training: `p` and `val` by batch entry. In training, `val` replaces the entry of a share `p` of samples.
        monitor: logged value that selects the best checkpoint.
        use_ema: keep a moving average of the UNet's weights.
        first_stage_key: batch entry that holds the images.
        image_size, channels: size of the diffused tensor.
        log_every_t: timesteps between the images of a diffusion row.
        clip_denoised: clamp x₀ to [-1, 1] in ancestral sampling.
        v_posterior: see `diffusion_buffers`.
        conditioning_key: see `DiffusionWrapper`.
        parameterization: prediction of the UNet: `eps`, `x0` or `v`.
        scheduler_config: `target`, `params` and `interval` of a learning rate schedule; see `build_schedule`.
        optimizer_config: `target` and `params` of the optimizer. The default is fused AdamW.
        use_positional_encodings: accepted for old configs and ignored.
        loss_config: `target` and `params` of the loss weighting, a class of `ldm.models.diffusion.loss`.
        timestep_config: `target` and `params` of the distribution of timesteps, a class of
            `ldm.models.diffusion.timesteps`.
        noise_config: `target` and `params` of the noise of training, a class of `ldm.models.diffusion.noise`.
        original_elbo_weight, l_simple_weight, learn_logvar, logvar_init, min_snr_gamma: older keys for the weightings
            `VariationalBound`, `LogVariance` and `MinSNR`, in place of `loss_config`.
    """

    learning_rate: float | None = None  # set before training
    # Timesteps (B,) and losses (B,) of the last batch, by which callbacks identify a sample. In validation, the losses
    # are those of the weights, not of their EMA.
    sample_losses: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        min_snr_gamma: float | None = None,
        loss_config: Mapping[str, Any] | None = None,
        timestep_config: Mapping[str, Any] | None = None,
        noise_config: Mapping[str, Any] | None = None,
        rescale_betas_zero_snr: bool = False,
        load_ema: bool = True,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
        make_it_fit: bool = False,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        check_choice("loss_type", loss_type, LOSS_TYPES)
        check_number("log_every_t", log_every_t, least=1)
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.parameterization, self.loss_type, self.v_posterior = parameterization, loss_type, v_posterior
        self.monitor, self.log_every_t, self.clip_denoised = monitor, log_every_t, clip_denoised
        self.scheduler_config, self.optimizer_config, self.use_ema = scheduler_config, optimizer_config, use_ema
        self.load_ema, self.reset_num_ema_updates = load_ema and not reset_ema, reset_num_ema_updates
        self.make_it_fit, self.replacements = make_it_fit, replacements_of(ucg_training)
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if use_ema:
            self.model_ema = LitEma(self.model)
        options = linear_start, linear_end, cosine_s, rescale_betas_zero_snr
        self.register_schedule(given_betas, beta_schedule, timesteps, *options)
        self.weighting = weighting_of(
            loss_config, min_snr_gamma, learn_logvar, logvar_init, original_elbo_weight, l_simple_weight
        )
        self.weighting.attach(self)
        self.timestep_distribution = distribution_of(timestep_config)
        self.timestep_distribution.attach(self)
        self.training_noise = noise_of(noise_config)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    # Training

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the weights do not determine: parameterization, trained parts, and the state of the timesteps."""
        checkpoint[PREDICTION] = self.parameterization
        self.trained_parts.save(checkpoint)
        state = self.timestep_distribution.state(self)
        if state:
            checkpoint[TIMESTEP_STATE] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_parts.check(checkpoint, self)
        self.timestep_distribution.load_state(self, checkpoint.get(TIMESTEP_STATE, {}))

    def get_input(self, batch: Batch, k: str) -> Tensor:
        """Return the images `batch[k]`, (B, H, W, C) or (B, H, W), as float32 (B, C, H, W)."""
        x = batch_entry(batch, k)
        if x.ndim == 3:
            x = x[..., None]
        return rearrange(x, "b h w c -> b c h w").contiguous().float()

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Return the UNet's prediction (B, C, H, W) for the noisy `x` at timesteps `t`."""
        return self.model(x, t)

    def training_loss(
        self, output: Tensor, target: Tensor, t: Tensor, samples: BatchMean = EQUAL
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, weighted by `weighting` and `samples`, and the values to log."""
        error = self.weighting.error(self, target.float() - output.float(), t)
        per_sample = samples.of_elements(error)  # (B,)
        self.sample_losses = (t, per_sample.detach())
        split, mean, loss_mean = "train" if self.training else "val", samples.training_mean, samples.loss_mean
        unbiased = per_sample
        if self.training:
            mean, loss_mean = (self.timestep_distribution.unbiased(self, each, t) for each in (mean, loss_mean))
            unbiased = self.timestep_distribution.unbiased(self, lambda values: values, t)(per_sample)
            self.timestep_distribution.observe(self, self.weighting.of_samples(self, per_sample, t), t)
        logged = {f"{split}/loss_simple": mean(per_sample), **samples.logged(unbiased, split)}
        logged |= self.weighting.logged(self, per_sample, t, mean, split)
        logged[f"{split}/loss_vlb"] = mean(self.lvlb_weights[t] * per_sample)
        logged[f"{split}/loss"] = loss = self.weighting.loss(self, per_sample, t, loss_mean)
        return loss, {key: value.detach() for key, value in logged.items()}

    def p_losses(
        self,
        x_start: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor | None = None,
        samples: BatchMean = EQUAL,
        perturbation: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss at timesteps `t` (B,) of clean `x_start` (B, C, H, W) under `cond`, and the values to log.

        `perturbation` is added to the noise of the model's input, and not to that of the target.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        _, seen = samples.timesteps_and_noise(t, noise if perturbation is None else noise + perturbation)
        t, noise = samples.timesteps_and_noise(t, noise)
        output = self.apply_model(self.q_sample(x_start, t, seen), t, cond)
        return self.training_loss(output, samples.target(self.training_target(x_start, noise, t)), t, samples)

    def sample_timesteps(self, x: Tensor, streams: RandomStreams = GLOBAL_STREAM) -> Tensor:
        """Return timesteps (B,), sampled by `timestep_config` in training, and fixed or uniform in evaluation."""
        if self.training:
            return self.timestep_distribution.sample(self, x, streams)
        return streams.held_out_timesteps(self.num_timesteps, x)

    def forward(
        self, x: Tensor, c: Conditioning = None, samples: BatchMean = EQUAL, streams: RandomStreams = GLOBAL_STREAM
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of clean `x` (B, C, H, W) under `c` at sampled timesteps, and the values to log."""
        t = self.sample_timesteps(x, streams)
        c = self.conditioning_at(c, t, streams)
        noise, perturbation = (self.training_noise if self.training else PLAIN_NOISE).sample(x, streams)
        return self.p_losses(x, c, t, noise, samples, perturbation)

    def shared_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and the values to log."""
        streams = RandomStreams.of(batch)
        x = self.diffused(batch, streams)
        samples = self.weighting.samples(batch, self.samples_of(batch), self.training)
        return self(x, self.encode_conditioning(batch), samples, streams)

    # Methods of an unconditional model of pixels. `LatentDiffusion` overrides them.

    def diffused(self, batch: Batch, streams: RandomStreams = GLOBAL_STREAM) -> Tensor:
        """Return the clean tensor (B, C, H, W) to diffuse."""
        return self.get_input(batch, self.first_stage_key)

    def encode_conditioning(self, batch: Batch) -> Conditioning:
        """Return the conditioning of a batch, in the form that `apply_model` takes."""
        return None

    def conditioning_at(self, c: Conditioning, t: Tensor, streams: RandomStreams = GLOBAL_STREAM) -> Conditioning:
        """Return the conditioning that the model sees at timesteps `t` (B,)."""
        return c

    def samples_of(self, batch: Batch) -> BatchMean:
        """Return the averaging of the losses of a batch."""
        return EQUAL

    def encode_with_images(self, batch: Batch) -> tuple[Tensor, Conditioning, Tensor]:
        """Return the tensor to diffuse, its conditioning, and the images (B, C, H, W)."""
        x = self.diffused(batch)
        return x, self.encode_conditioning(batch), x

    def to_images(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W), about [-1, 1], of a clean `x`."""
        return x

    @property
    def reads_captions(self) -> bool:
        """True if the model can encode captions."""
        return False

    def get_unconditional_conditioning(
        self, batch_size: int, null_label: str | Sequence[str] = "", cond: Conditioning = None
    ) -> Conditioning:
        """Return the unconditional conditioning for classifier-free guidance."""
        return None

    # Sampling

    @torch.no_grad()
    def sample(
        self, batch_size: int = 16, cond: Conditioning = None, timesteps: int | None = None, x_T: Tensor | None = None
    ) -> Tensor:
        """Return ancestral samples (B, C, H, W), one step per training timestep. Other samplers are faster."""
        shape = (self.channels, self.image_size, self.image_size)
        sampler = AncestralSampler(self, clip_denoised=self.clip_denoised)
        steps = timesteps or self.num_timesteps
        return sampler.sample(steps, batch_size, shape, conditioning=cond, x_T=x_T, verbose=False)[0]

    @wraps(log_images)  # the image logger checks its arguments against this signature
    def log_images(self, batch: Batch, N: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        """Return images (N, 3, H, W) in [-1, 1] by name; see `ldm.models.diffusion.log_images`."""
        return log_images(self, batch, N, **kwargs)
