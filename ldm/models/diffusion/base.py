"""Diffusion of images as a Lightning module; the base of diffusion of latents.

B batch; C, H, W channels, height and width of the diffused tensor; t (B,) timesteps that count from 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor

from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.draws import FROM_GLOBAL, Draws
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.log_images import log_images
from ldm.models.diffusion.loss import EQUAL, BatchMean, weighting_of
from ldm.models.diffusion.replacement import replacements_of
from ldm.models.diffusion.steps import Steps
from ldm.models.diffusion.weights import StartsFromWeights
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.diffusionmodules.schedule import PARAMETERIZATIONS, GaussianDiffusion
from ldm.modules.diffusionmodules.util import KeepsTypes
from ldm.modules.ema import LitEma
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


class DDPM(Steps, StartsFromWeights, GaussianDiffusion, KeepsTypes, pl.LightningModule):
    """Denoising diffusion of images (arXiv:2006.11239).

    Args:
        unet_config: `target` and `params` of the UNet.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s: see `make_beta_schedule`.
        given_betas: the schedule itself, in place of these.
        rescale_betas_zero_snr: see `rescale_to_zero_snr`; for `v` and `x0`.
        loss_type: `l1` or `l2`.
        ckpt_path, ignore_keys, load_only_unet: weights to start from, and key prefixes to leave out of them.
        load_ema, reset_ema: take the file's moving average along, or begin one at its weights.
        reset_num_ema_updates: let the average follow quickly again, as it does at its start.
        make_it_fit: repeat a tensor of the file where the model's is larger.
        ucg_training: by batch entry, `p` and `val`: the share of samples whose entry `val` replaces in training.
        monitor: the logged value that picks the best checkpoint.
        use_ema: keep a moving average of the UNet's weights.
        first_stage_key: the batch entry that holds the images.
        image_size, channels: of the diffused tensor.
        log_every_t: steps between the images of a diffusion row.
        clip_denoised: keep x₀ in [-1, 1] in ancestral sampling.
        v_posterior: see `diffusion_buffers`.
        conditioning_key: see `DiffusionWrapper`.
        parameterization: what the UNet predicts: `eps`, `x0` or `v`.
        scheduler_config: `target` and `params` of a multiplier from `ldm.lr_scheduler`.
        optimizer_config: `target` and `params` of the optimizer; fused AdamW without one.
        use_positional_encodings: accepted for old configs; no model here has any.
        loss_config: `target` and `params` of the loss weighting, a class of `ldm.models.diffusion.loss`.
        original_elbo_weight, l_simple_weight, learn_logvar, logvar_init, min_snr_gamma: the weighting by older keys,
            in place of `loss_config`: `VariationalBound`, `LogVariance` and `MinSNR`.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str = "val/loss",
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
        rescale_betas_zero_snr: bool = False,
        load_ema: bool = True,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
        make_it_fit: bool = False,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise UserError(f"parameterization {parameterization!r} is unknown; valid: {', '.join(PARAMETERIZATIONS)}")
        check_number("log_every_t", log_every_t, least=1)
        if loss_type not in ("l1", "l2"):
            raise UserError(f"loss_type {loss_type!r} is unknown; valid: l1, l2")
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.monitor = monitor
        self.use_ema = use_ema
        self.load_ema = load_ema and not reset_ema
        self.reset_num_ema_updates = reset_num_ema_updates
        self.make_it_fit = make_it_fit
        self.replacements = replacements_of(ucg_training)
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.log_every_t = log_every_t
        self.clip_denoised = clip_denoised
        self.v_posterior = v_posterior
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config
        self.learning_rate: float | None = None  # set by whoever trains
        # Timesteps (B,) and losses (B,) of the last batch, for whoever must name a sample.
        self.sample_losses: tuple[Tensor, Tensor] | None = None

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if use_ema:
            self.model_ema = LitEma(self.model)
        if rescale_betas_zero_snr and parameterization == "eps":
            logger.warning("rescale_betas_zero_snr: eps predicts nothing of the last step; set parameterization to v")
        ends = linear_start, linear_end, cosine_s
        self.register_schedule(given_betas, beta_schedule, timesteps, *ends, rescale_betas_zero_snr)
        self.weighting = weighting_of(
            loss_config, min_snr_gamma, learn_logvar, logvar_init, original_elbo_weight, l_simple_weight
        )
        self.weighting.attach(self)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    # Training

    def get_input(self, batch: Batch, k: str) -> Tensor:
        """Return the images `batch[k]`, channels last (B, H, W, C) or without channels, as (B, C, H, W) float32."""
        x = batch_entry(batch, k)
        if x.ndim == 3:
            x = x[..., None]
        return rearrange(x, "b h w c -> b c h w").contiguous().float()

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Return the UNet's prediction (B, C, H, W) at the noisy `x`."""
        return self.model(x, t)

    def training_loss(
        self, output: Tensor, target: Tensor, t: Tensor, samples: BatchMean = EQUAL
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, by `weighting` and `samples`, and its parts to log, those of the training samples."""
        error = target.float() - output.float()
        per_sample = (error.abs() if self.loss_type == "l1" else error.square()).flatten(1).mean(1)  # (B,)
        self.sample_losses = (t, per_sample.detach())
        split, mean = "train" if self.training else "val", samples.training_mean
        logged = {f"{split}/loss_simple": mean(per_sample), **samples.logged(per_sample, split)}
        logged |= self.weighting.logged(self, per_sample, t, mean, split)
        logged[f"{split}/loss_vlb"] = mean(self.lvlb_weights[t] * per_sample)
        logged[f"{split}/loss"] = loss = self.weighting.loss(self, per_sample, t, samples.joined)
        return loss, {key: value.detach() for key, value in logged.items()}

    def p_losses(
        self,
        x_start: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor | None = None,
        samples: BatchMean = EQUAL,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss at timesteps `t` (B,) of clean `x_start` (B, C, H, W) under `cond`, and its parts to log."""
        noise = torch.randn_like(x_start) if noise is None else noise
        t, noise = samples.asked(t, noise)
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        return self.training_loss(output, samples.target(self.training_target(x_start, noise, t)), t, samples)

    def draw_timesteps(self, x: Tensor, draws: Draws = FROM_GLOBAL) -> Tensor:
        """Return uniform timesteps (B,)."""
        return draws.integers("timestep", self.num_timesteps, x)

    def forward(
        self, x: Tensor, c: Conditioning = None, samples: BatchMean = EQUAL, draws: Draws = FROM_GLOBAL
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of clean `x` (B, C, H, W) under `c`, at random timesteps, and its parts to log."""
        t = self.draw_timesteps(x, draws)
        c = self.conditioning_at(c, t, draws)
        return self.p_losses(x, c, t, draws.normal("noise", x), samples)

    def shared_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and its parts to log."""
        draws = Draws.of(batch)
        x = self.diffused(batch, draws)
        samples = self.samples_of(batch)
        return self(x, self.encode_conditioning(batch), samples, draws)

    # The answers of a model of pixels without conditioning; `LatentDiffusion` has others.

    def diffused(self, batch: Batch, draws: Draws = FROM_GLOBAL) -> Tensor:
        """Return the clean tensor (B, C, H, W) that is diffused."""
        return self.get_input(batch, self.first_stage_key)

    def encode_conditioning(self, batch: Batch) -> Conditioning:
        """Return the conditioning of a batch, in the form that `apply_model` takes."""
        return None

    def conditioning_at(self, c: Conditioning, t: Tensor, draws: Draws = FROM_GLOBAL) -> Conditioning:
        """Return the conditioning that the model sees at timesteps `t` (B,)."""
        return c

    def samples_of(self, batch: Batch) -> BatchMean:
        """Return how the samples of a batch count."""
        return EQUAL

    def encode_with_images(self, batch: Batch) -> tuple[Tensor, Conditioning, Tensor]:
        """Return what is diffused, its conditioning, and the images (B, C, H, W) that it stands for."""
        x = self.diffused(batch)
        return x, self.encode_conditioning(batch), x

    def to_images(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W), about [-1, 1], that a clean `x` stands for."""
        return x

    @property
    def reads_captions(self) -> bool:
        """Whether the conditioning of captions can be asked for."""
        return False

    def get_unconditional_conditioning(
        self, batch_size: int, null_label: str | Sequence[str] = "", cond: Conditioning = None
    ) -> Conditioning:
        """Return what guidance moves away from."""
        return None

    # Sampling

    @torch.no_grad()
    def sample(
        self, batch_size: int = 16, cond: Conditioning = None, timesteps: int | None = None, x_T: Tensor | None = None
    ) -> Tensor:
        """Return ancestral samples (B, C, H, W), one step per training timestep. The samplers are faster."""
        shape = (self.channels, self.image_size, self.image_size)
        sampler = AncestralSampler(self, clip_denoised=self.clip_denoised)
        steps = timesteps or self.num_timesteps
        return sampler.sample(steps, batch_size, shape, conditioning=cond, x_T=x_T, verbose=False)[0]

    @wraps(log_images)  # whose signature tells the image logger what may be asked for
    def log_images(self, batch: Batch, N: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        """Return images (N, 3, H, W) in [-1, 1] for the image logger; see `ldm.models.diffusion.log_images`."""
        return log_images(self, batch, N, **kwargs)
