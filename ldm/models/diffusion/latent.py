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
from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.draws import FROM_GLOBAL, Draws
from ldm.models.diffusion.first_stage import WithFirstStage
from ldm.models.diffusion.preservation import Prior, check_prior_settings
from ldm.models.diffusion.sampling import Conditioning
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)


def check_reads_captions(model: Any) -> None:
    """Raise `UserError` unless the model's cond stage takes captions: not entries of batches, nor images."""
    stage = model.cond_stage_model
    if stage is None or stage is model.first_stage_model or getattr(stage, "key", None) is not None:
        raise UserError(
            f"the config's cond_stage_config, {'none' if stage is None else type(stage).__name__}, reads no captions; "
            "name the config that has the text encoder, such as stable_diffusion_v1.yaml"
        )


class LatentDiffusion(WithFirstStage, DDPM):
    """Diffusion in the latent space of a frozen first stage (arXiv:2112.10752).

    The batch entry `first_stage_key` is either images, channels last (B, H, W, 3) in [-1, 1], which the first stage
    encodes; or pre-encoded, channels first and unscaled: a posterior's parameters (B, 2C, h, w), from which a fresh
    latent is drawn at every step, or a latent (B, C, h, w).

    Where training batches are pre-encoded the first stage waits in the host's memory, and comes to the device only for
    what needs it, such as pictures.

    Args:
        first_stage_config, cond_stage_config: `target` and `params`; the cond stage may also be
            `__is_first_stage__` or `__is_unconditional__`.
        num_timesteps_cond: timesteps at which the conditioning itself is noised; 1 for none.
        cond_stage_key: the batch entry that is conditioned on.
        cond_stage_trainable: train the cond stage along.
        unet_trainable: train the UNet; if not, it stays as it is, and gradients pass through it to the cond stage.
        concat_mode: what an unset `conditioning_key` means: `concat`, or `crossattn`.
        cond_stage_forward: the cond stage's method to call, instead of `encode` or `forward`.
        concat_keys: batch entries (channels first) concatenated to the input, for `conditioning_key: hybrid`.
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
        concat_keys: Sequence[str] = (),
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        prior_loss_weight: float = 1.0,
        prior_target: str = "data",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        if cond_stage_config == "__is_unconditional__":
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
        if not (unet_trainable or cond_stage_trainable or self.learn_logvar):
            raise UserError("unet_trainable: false leaves nothing to train; set cond_stage_trainable: true beside it")
        self.model.requires_grad_(unet_trainable)
        self.cond_stage_forward = cond_stage_forward
        self.concat_keys = tuple(concat_keys)
        if conditioning_key == "hybrid" and not concat_keys:
            raise UserError("conditioning_key 'hybrid' needs concat_keys, the batch entries to put onto the input")
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
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if self.cond_stage_model is not None:
            self.cond_stage_model.requires_grad_(cond_stage_trainable)
        self.train()
        if ckpt_path is not None:  # only now are the two stages there to be loaded
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

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
        return [*trained, *([self.logvar] if self.learn_logvar else [])]

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

    # Conditioning

    def get_learned_conditioning(self, c: Any) -> Conditioning:
        """What the cond stage makes of raw conditioning: captions → (B, 77, D), labels → (B, 1, D), and so on."""
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        encoded = encode(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def raw_conditioning(self, batch: Batch) -> Any:
        """The batch entry `cond_stage_key`; the whole batch for a cond stage that picks its entry by a `key`."""
        if getattr(self.cond_stage_model, "key", None) is not None:
            return batch
        entry = batch_entry(batch, self.cond_stage_key)
        images = isinstance(entry, Tensor) and entry.ndim == 4  # as in all of latent diffusion, channels last
        return super().get_input(batch, self.cond_stage_key) if images else entry

    def encode_conditioning(self, batch: Batch) -> Conditioning:
        """The conditioning of a batch, in the form that `apply_model` takes; None for an unconditional model."""
        if self.model.conditioning_key is None:
            return None
        with torch.set_grad_enabled(self.cond_stage_trainable and torch.is_grad_enabled()):
            encoded = self.get_learned_conditioning(self.raw_conditioning(batch))
        if isinstance(encoded, Tensor) and encoded.is_floating_point():
            # Stored encodings are float16, which autocast on the CPU does not mix with bfloat16.
            encoded = encoded.float()
        if self.model.conditioning_key != "hybrid":
            return encoded
        return {"c_concat": [batch_entry(batch, key).float() for key in self.concat_keys], "c_crossattn": [encoded]}

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """The UNet's prediction at the noisy `x` (B, C, h, w).

        `cond` is a tensor, a list of them, or a dict with lists under `c_concat` and `c_crossattn`.
        """
        if cond is None:
            return self.model(x, t)
        if not isinstance(cond, Mapping):
            cond = cond if isinstance(cond, (list, tuple)) else [cond]
            cond = {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": cond}
        return self.model(x, t, **cond)

    # Training

    def p_losses(
        self,
        x_start: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor | None = None,
        prior: Prior | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at timesteps `t` (B,) of clean scaled latents `x_start` (B, C, h, w) under `cond`."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if prior:
            t, noise = prior.asked(t, noise)
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target = self.training_target(x_start, noise, t)
        return self.training_loss(output, prior.target(target) if prior else target, t, prior)

    def forward(
        self, x: Tensor, c: Conditioning, prior: Prior | None = None, draws: Draws = FROM_GLOBAL
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of clean latents at random timesteps, with the conditioning noised if the config says so."""
        t = self.draw_timesteps(x, draws)
        if self.num_timesteps_cond > 1:
            c = self._noised_conditioning(c, self.cond_ids[t], draws)
        return self.p_losses(x, c, t, noise=draws.normal("noise", x), prior=prior)

    def _noised_conditioning(
        self, c: Conditioning, t: Tensor, draws: Draws, what: str = "conditioning"
    ) -> Conditioning:
        if isinstance(c, Mapping):
            return {
                key: [self._noised_conditioning(entry, t, draws, f"{key}/{i}") for i, entry in enumerate(entries)]
                for key, entries in c.items()
            }
        return self.q_sample(c, t, draws.normal(what, c)) if isinstance(c, Tensor) and c.is_floating_point() else c

    def shared_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        draws = Draws.of(batch)
        latent = self.get_first_stage_encoding(self.encode_batch(batch), draws)
        prior = Prior.of(batch, self.prior_loss_weight, self.prior_target)
        return self(latent, self.encode_conditioning(batch), prior, draws)

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

    # Pictures

    @wraps(DDPM.log_images)
    def log_images(self, batch: Batch, N: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        try:
            return super().log_images(batch, N, **kwargs)
        finally:
            self._put_first_stage_away(batch)
