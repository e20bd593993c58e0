"""Diffusion of images as a Lightning module; what diffusion of latents builds on.

B batch; C, H, W channels, height and width of what is diffused; t (B,) timesteps that count from 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.checkpoint import LoadReport, load_file_into
from ldm.checkpoint.keys import EMA, MODEL, has_part
from ldm.distributed.collectives import mean_over_processes
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.draws import FROM_GLOBAL, Draws
from ldm.models.diffusion.log_images import log_images
from ldm.models.diffusion.preservation import Prior
from ldm.models.diffusion.sampling import Conditioning
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.diffusionmodules.schedule import PARAMETERIZATIONS, GaussianDiffusion, min_snr_weights
from ldm.modules.diffusionmodules.util import KeepsTypes
from ldm.modules.ema import LitEma
from ldm.optim import build_optimizer
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)


class DDPM(GaussianDiffusion, KeepsTypes, pl.LightningModule):
    """Denoising diffusion of images (arXiv:2006.11239).

    Args:
        unet_config: `target` and `params` of the UNet.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s: see `make_beta_schedule`.
        given_betas: the schedule itself, in place of these.
        loss_type: `l1` or `l2`.
        ckpt_path, ignore_keys, load_only_unet: weights to start from, and key prefixes to leave out of them.
        monitor: the logged value that picks the best checkpoint.
        use_ema: keep a moving average of the UNet's weights.
        first_stage_key: the batch entry that holds the images.
        image_size, channels: of what is diffused.
        log_every_t: steps between the pictures of a denoising row.
        clip_denoised: keep x₀ in [-1, 1] in ancestral sampling.
        original_elbo_weight, l_simple_weight: weights of the variational bound and of the simple loss (eq. 14).
        v_posterior: see `diffusion_buffers`.
        conditioning_key: see `DiffusionWrapper`.
        parameterization: what the UNet predicts: `eps`, `x0` or `v`.
        scheduler_config: `target` and `params` of a multiplier from `ldm.lr_scheduler`.
        optimizer_config: `target` and `params` of the optimizer; fused AdamW without one.
        use_positional_encodings: accepted for old configs; no model here has any.
        learn_logvar, logvar_init: a log variance a timestep that weights the loss.
        min_snr_gamma: weight the simple loss by `min_snr_weights`: little noise counts less; 5 is usual.
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
    ) -> None:
        super().__init__()
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserError(f"min_snr_gamma {min_snr_gamma!r}: give a number above 0, or leave it out")
        if parameterization not in PARAMETERIZATIONS:
            raise UserError(f"parameterization {parameterization!r} is unknown; valid: {', '.join(PARAMETERIZATIONS)}")
        if loss_type not in ("l1", "l2"):
            raise UserError(f"loss_type {loss_type!r} is unknown; valid: l1, l2")
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.monitor = monitor
        self.use_ema = use_ema
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.log_every_t = log_every_t
        self.clip_denoised = clip_denoised
        self.original_elbo_weight = original_elbo_weight
        self.v_posterior = v_posterior
        self.l_simple_weight = l_simple_weight
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config
        self.learn_logvar = learn_logvar
        self.learning_rate: float | None = None  # set by whoever trains
        # Timesteps (B,) and losses (B,) of the last batch, for whoever must name a sample.
        self.sample_losses: tuple[Tensor, Tensor] | None = None

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        snr_weights = None
        if min_snr_gamma is not None:
            snr_weights = min_snr_weights(self.alphas_cumprod, min_snr_gamma, parameterization)
        self.register_buffer("snr_weights", snr_weights, persistent=False)
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> LoadReport:
        """Load weights from a checkpoint, leaving out keys that start with one of `ignore_keys`.

        With `only_model`, just the UNet. An EMA that the file does not hold starts from the loaded weights.

        Raises:
            UserError: the file cannot be read, or does not fit this model.
        """
        module, prefix = (self.model, MODEL) if only_model else (self, "")
        report = load_file_into(module, path, ignore_keys, prefix)
        if only_model or has_part(report.missing, EMA):
            self.restart_ema()
        return report

    def restart_ema(self) -> None:
        """Begin the moving average, if there is one, at the present weights."""
        if self.use_ema:
            self.model_ema = LitEma(self.model)

    # Training

    def get_input(self, batch: Batch, k: str) -> Tensor:
        """The images `batch[k]`, channels last (B, H, W, C) or without channels, as (B, C, H, W) float32."""
        x = batch_entry(batch, k)
        if x.ndim == 3:
            x = x[..., None]
        return rearrange(x, "b h w c -> b c h w").contiguous().float()

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """The UNet's prediction (B, C, H, W) at the noisy `x`."""
        return self.model(x, t)

    def training_loss(
        self, output: Tensor, target: Tensor, t: Tensor, prior: Prior | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its logged parts: simple + weight · variational bound, over exp(logvar) (eq. 14).

        With a `prior` its samples join in as it says, and the parts are those of the training samples.
        """
        mean, joined = (prior.training_mean, prior.joined) if prior else (Tensor.mean, Tensor.mean)
        error = target.float() - output.float()
        per_sample = (error.abs() if self.loss_type == "l1" else error.square()).flatten(1).mean(1)  # (B,)
        self.sample_losses = (t, per_sample.detach())
        prefix = "train" if self.training else "val"
        logged = {f"{prefix}/loss_simple": mean(per_sample)}
        if prior:
            logged[f"{prefix}/loss_prior"] = prior.prior_mean(per_sample)

        logvar = self.logvar[t]
        simple = per_sample if self.snr_weights is None else self.snr_weights[t] * per_sample
        weighted = simple / logvar.exp() + logvar
        if self.learn_logvar:
            logged[f"{prefix}/loss_gamma"] = mean(weighted)
            logged["logvar"] = self.logvar.mean()
        bound = self.lvlb_weights[t] * per_sample
        logged[f"{prefix}/loss_vlb"] = mean(bound)
        loss = self.l_simple_weight * joined(weighted) + self.original_elbo_weight * joined(bound)
        logged[f"{prefix}/loss"] = loss
        return loss, {key: value.detach() for key, value in logged.items()}

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at timesteps `t` (B,) of clean `x_start` (B, C, H, W)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t)
        return self.training_loss(output, self.training_target(x_start, noise, t), t)

    def draw_timesteps(self, x: Tensor, draws: Draws = FROM_GLOBAL) -> Tensor:
        """Uniform timesteps (B,)."""
        return draws.integers("timestep", self.num_timesteps, x)

    def forward(self, x: Tensor, draws: Draws = FROM_GLOBAL) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of clean images at random timesteps."""
        t = self.draw_timesteps(x, draws)
        return self.p_losses(x, t, draws.normal("noise", x))

    def shared_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what to log of it."""
        return self(self.get_input(batch, self.first_stage_key), Draws.of(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, logged = self.shared_step(batch)
        # All in one message, not one by one, as with `sync_dist`.
        means = mean_over_processes(torch.stack(list(logged.values())))
        self.log_dict(dict(zip(logged, means, strict=True)), batch_size=self.batch_size_of(batch))
        return loss

    def batch_size_of(self, batch: Batch) -> int:
        """The number of samples in a batch."""
        return len(batch[self.first_stage_key])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the weights and of their EMA, on the same noise and timesteps in every epoch."""
        self._log_evaluation(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_evaluation(batch, batch_idx, "test")

    def _log_evaluation(self, batch: Batch, batch_idx: int, split: str) -> None:
        losses = self._validation_losses(batch, batch_idx)
        with self.ema_scope():
            # Without an EMA the second name still exists, for `monitor`.
            averaged = self._validation_losses(batch, batch_idx) if self.use_ema else losses
        losses = losses | {f"{key}_ema": value for key, value in averaged.items()}
        logged = {key.replace("val/", f"{split}/", 1): value for key, value in losses.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=self.batch_size_of(batch))

    def _validation_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(batch_idx)
            return self.shared_step(batch)[1]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """An optimizer step and, at once, the EMA's: a checkpoint written right after a step holds both."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning would keep the gradients until the next backward, beside its activations
        if self.use_ema:
            self.model_ema(self.model)

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Within it the model has its averaged weights, if it keeps an EMA. `context` names the use in the log."""
        if not self.use_ema:
            return nullcontext()
        if context:
            logger.info("%s: with averaged weights", context)
        return self.model_ema.applied_to(self.model)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer gets, in order."""
        return list(self.model.parameters()) + ([self.logvar] if self.learn_logvar else [])

    def configure_optimizers(self) -> Any:
        """The optimizer of `optimizer_config` (default: fused AdamW), with the multiplier of `scheduler_config`.

        Raises:
            UserError: no learning rate was set, or the optimizer does not take its `params`.
        """
        if self.learning_rate is None:
            raise UserError("no learning rate: set model.base_learning_rate in the config")
        config = self.optimizer_config or {"target": "torch.optim.AdamW", "params": {"fused": True}}
        optimizer = build_optimizer(config, self.trained_parameters(), self.learning_rate, "optimizer_config")
        if self.scheduler_config is None:
            return optimizer
        multiplier = instantiate_from_config(self.scheduler_config)
        scheduler = LambdaLR(optimizer, lr_lambda=multiplier.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    # Sampling

    @torch.no_grad()
    def sample(
        self, batch_size: int = 16, cond: Conditioning = None, timesteps: int | None = None, x_T: Tensor | None = None
    ) -> Tensor:
        """Ancestral samples (B, C, H, W), one step a training timestep. See the samplers for faster ones."""
        shape = (self.channels, self.image_size, self.image_size)
        sampler = AncestralSampler(self, clip_denoised=self.clip_denoised)
        steps = timesteps or self.num_timesteps
        return sampler.sample(steps, batch_size, shape, conditioning=cond, x_T=x_T, verbose=False)[0]

    @wraps(log_images)  # whose signature tells the image logger what may be asked for
    def log_images(self, batch: Batch, N: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        """Pictures (N, 3, H, W) in [-1, 1] for the image logger; see `ldm.models.diffusion.log_images`."""
        return log_images(self, batch, N, **kwargs)
