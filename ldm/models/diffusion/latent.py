"""Diffusion in the latent space of a first stage, under conditioning, as a Lightning module.

B batch; C, h, w channels, height and width of a latent; t (B,) timesteps that count from 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import LoadReport
from ldm.distributed.collectives import mean_over_processes
from ldm.models.diffusion.base import DDPM
from ldm.models.diffusion.batch import Batch
from ldm.models.diffusion.conditioning import WithConditioning, check_reads_captions
from ldm.models.diffusion.draws import FROM_GLOBAL, Draws
from ldm.models.diffusion.first_stage import WithFirstStage
from ldm.models.diffusion.loss import EQUAL, BatchMean
from ldm.models.diffusion.preservation import Prior, check_prior_settings
from ldm.models.diffusion.sampling import Conditioning
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)


__all__ = ["LatentDiffusion", "check_reads_captions"]


class LatentDiffusion(WithFirstStage, WithConditioning, DDPM):
    """Diffusion in the latent space of a frozen first stage (arXiv:2112.10752).

    The batch entry `first_stage_key` is either images, channels last (B, H, W, 3) in [-1, 1], which the first stage
    encodes; or pre-encoded, channels first and unscaled: a posterior's parameters (B, 2C, h, w), from which a fresh
    latent is sampled at every step, or a latent (B, C, h, w).

    Where training batches are pre-encoded, the first stage waits in the host's memory. It comes to the device only
    where it is needed, such as for images.

    Args:
        first_stage_config, cond_stage_config: `target` and `params`; the cond stage may also be
            `__is_first_stage__` or `__is_unconditional__`. The state-dict keys of a `GeneralConditioner` begin with
            `conditioner`, as SDXL's do; those of any other with `cond_stage_model`.
        num_timesteps_cond: timesteps at which the conditioning itself is noised; 1 for none.
        cond_stage_key: the batch entry that is conditioned on.
        cond_stage_trainable: train the cond stage along.
        unet_trainable: train the UNet; if not, it stays as it is, and gradients pass through it to the cond stage.
        concat_mode: what an unset `conditioning_key` means: `concat`, or `crossattn`.
        cond_stage_forward: the cond stage's method to call, instead of `encode` or `forward`.
        concat_keys: batch entries (channels first) concatenated to the input, for `conditioning_key: hybrid`.
        force_null_conditioning: keep `conditioning_key` with `__is_unconditional__`: the batch's entry conditions.
        scale_factor: latents are multiplied by it.
        scale_by_std: set `scale_factor` to 1 / standard deviation of the first batch's latents.
        prior_loss_weight: weight of the loss on samples that the batch marks as the prior's; see `Prior`.
        prior_target: what these are to predict: the `data`'s target, or a `teacher`'s stored prediction.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = 1,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        unet_trainable: bool = True,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        concat_keys: Sequence[str] | None = None,
        force_null_conditioning: bool = False,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        prior_loss_weight: float = 1.0,
        prior_target: str = "data",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.clip_denoised = False  # latents are not bounded as pixels are
        num_timesteps_cond = 1 if num_timesteps_cond is None else num_timesteps_cond
        if not 1 <= num_timesteps_cond <= self.num_timesteps:
            raise UserError(f"num_timesteps_cond {num_timesteps_cond}: choose 1 to timesteps ({self.num_timesteps})")
        check_prior_settings(prior_loss_weight, prior_target)
        if prior_target == "teacher" and num_timesteps_cond > 1:
            raise UserError(
                f"prior_target: teacher holds what was predicted under clean captions, which num_timesteps_cond: "
                f"{num_timesteps_cond} noises; set it to 1, or set prior_target: data"
            )
        self.prior_loss_weight = prior_loss_weight
        self.prior_target = prior_target
        self.num_timesteps_cond = num_timesteps_cond
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.unet_trainable = unet_trainable
        if not unet_trainable and self.use_ema:
            raise UserError("use_ema: true averages the UNet, which unet_trainable: false freezes; set use_ema: false")
        if not (unet_trainable or cond_stage_trainable or list(self.parameters(recurse=False))):
            raise UserError("unet_trainable: false leaves nothing to train; set cond_stage_trainable: true beside it")
        self.model.requires_grad_(unet_trainable)
        self.cond_stage_forward = cond_stage_forward
        self.concat_keys = self.default_concat_keys if concat_keys is None else tuple(concat_keys)
        if self.model.takes_maps and conditioning_key != "concat" and not self.concat_keys:
            raise UserError(
                f"conditioning_key {conditioning_key!r} needs concat_keys, the batch entries to put onto the input"
            )
        self.scale_by_std = scale_by_std
        self._scale_is_loaded = False
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor
        if num_timesteps_cond > 1:
            ids = torch.full((self.num_timesteps,), self.num_timesteps - 1, dtype=torch.long)
            ids[:num_timesteps_cond] = torch.linspace(0, self.num_timesteps - 1, num_timesteps_cond).round().long()
            self.register_buffer("cond_ids", ids, persistent=False)

        self.first_stage_model = instantiate_from_config(first_stage_config).requires_grad_(False)
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        else:
            self._add_cond_stage(instantiate_from_config(cond_stage_config))
        if self.cond_stage_model is not None:
            self.cond_stage_model.requires_grad_(cond_stage_trainable)
        self.train()
        if ckpt_path is not None:  # only now are the two stages there to be loaded
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def _add_cond_stage(self, stage: nn.Module | None) -> None:
        """Make `stage` the cond stage, under the state-dict keys that its releases have."""
        if isinstance(stage, GeneralConditioner):
            self.conditioner = stage
            object.__setattr__(self, "cond_stage_model", stage)  # a second name, under which it has no keys
        else:
            self.cond_stage_model = stage

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if not self.unet_trainable:
            self.model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def trained_parameters(self) -> list[nn.Parameter]:
        parts = [self.model, self.cond_stage_model] if self.cond_stage_trainable else [self.model]
        trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        return [*trained, *self.parameters(recurse=False)]

    # Batches

    def check_batch_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check the shapes of a pre-encoded sample, by batch entry and without the batch.

        Raises:
            UserError: an entry does not fit the model.
        """
        latent = shapes.get(self.first_stage_key)
        if latent is not None and (len(latent) != 3 or latent[0] not in (self.channels, 2 * self.channels)):
            raise UserError(
                f"{self.first_stage_key} has shape {tuple(latent)}; the model takes ({2 * self.channels}, h, w), a "
                f"posterior's mean and log variance, or ({self.channels}, h, w), a latent"
            )
        unet = self.model.diffusion_model
        factor = getattr(unet, "downsampling", 1)
        if latent is not None and (latent[1] % factor or latent[2] % factor):
            raise UserError(f"{self.first_stage_key} has shape {tuple(latent)}; h and w must be multiples of {factor}")
        context, width = shapes.get(self.cond_stage_key), getattr(unet, "context_dim", None)
        if context is not None and width is not None and (len(context) != 2 or context[1] != width):
            raise UserError(
                f"{self.cond_stage_key} has shape {tuple(context)}; the UNet's context_dim is {width}: "
                "were the captions encoded by another text encoder?"
            )
        self.check_vector(shapes)

    # Training

    def diffused(self, batch: Batch, draws: Draws = FROM_GLOBAL) -> Tensor:
        """Return the scaled latents (B, C, h, w) of a batch."""
        return self.get_first_stage_encoding(self.encode_batch(batch), draws)

    def samples_of(self, batch: Batch) -> BatchMean:
        return Prior.of(batch, self.prior_loss_weight, self.prior_target) or EQUAL

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._scale_is_loaded = "scale_factor" in checkpoint["state_dict"]

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> LoadReport:
        report = super().init_from_ckpt(path, ignore_keys, only_model)
        self._scale_is_loaded = not only_model and "scale_factor" not in report.missing
        return report

    def on_train_start(self) -> None:
        """Let a cond stage that has a starting point of its own go there; a resumed run is past it."""
        begin = getattr(self.cond_stage_model, "begin_training", None)
        if begin is not None and self.global_step == 0:
            begin()

    @torch.no_grad()
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._put_first_stage_away(batch)
        if self.scale_by_std and not self._scale_is_loaded and self.global_step == 0 and batch_idx == 0:
            self.scale_factor.fill_(1.0)
            latent = self.get_first_stage_encoding(self.encode_batch(batch))
            self.scale_factor.copy_(1.0 / mean_over_processes(latent.std()))
            logger.info("scale_factor set to %.5f, from the first batch", self.scale_factor.item())

    # Images

    def encode_with_images(self, batch: Batch) -> tuple[Tensor, Conditioning, Tensor]:
        encoded = self.encode_batch(batch)
        latent, cond = self.get_first_stage_encoding(encoded), self.encode_conditioning(batch)
        if not self.is_pre_encoded(batch[self.first_stage_key]):
            return latent, cond, self.get_input(batch, self.first_stage_key)
        return latent, cond, self.to_images(self.most_likely_latent(encoded))  # the closest there is to the image

    def to_images(self, x: Tensor) -> Tensor:
        """Return the decoded images, one at a time: decoding takes far more memory than a training step."""
        return torch.cat([self.decode_first_stage(part) for part in x.split(1)])

    @wraps(DDPM.log_images)
    def log_images(self, batch: Batch, N: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        try:
            return super().log_images(batch, N, **kwargs)
        finally:
            self._put_first_stage_away(batch)
