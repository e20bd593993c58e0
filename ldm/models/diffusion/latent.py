"""Conditional diffusion in the latent space of an autoencoder, as a Lightning module.

B: batch. C, h, w: channels, height and width of a latent. t (B,): timesteps, counted from 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import LoadReport
from ldm.distributed.collectives import mean_over_processes
from ldm.models.diffusion.batch import Batch
from ldm.models.diffusion.batch_mean import EQUAL, BatchMean
from ldm.models.diffusion.conditioning import WithConditioning, check_reads_captions
from ldm.models.diffusion.first_stage import WithFirstStage
from ldm.models.diffusion.lora_training import train_lora
from ldm.models.diffusion.noise import PLAIN_NOISE
from ldm.models.diffusion.pixel import DDPM
from ldm.models.diffusion.preservation import Prior, check_prior_settings
from ldm.models.diffusion.random_streams import GLOBAL_STREAM, RandomStreams
from ldm.models.diffusion.sampling import Conditioning
from ldm.models.diffusion.timesteps import LossAware, Split
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.optim.parts import parts_of
from ldm.util import UserError, check_number, instantiate_from_config, located, refuse_if

logger = logging.getLogger(__name__)


__all__ = ["LatentDiffusion", "check_reads_captions"]


class LatentDiffusion(WithFirstStage, WithConditioning, DDPM):
    """Diffusion in the latent space of a frozen first stage, the autoencoder (arXiv:2112.10752).

    The batch entry `first_stage_key` takes one of three forms:

        images (B, H, W, 3) in [-1, 1], which the first stage encodes
        posterior parameters (B, 2C, h, w), unscaled, from which a latent is sampled at each step
        latents (B, C, h, w), unscaled

    If training batches are pre-encoded, the first stage stays in host memory and moves to the device on demand.

    Args:
        first_stage_config: `target` and `params` of the autoencoder.
        cond_stage_config: `target` and `params` of the cond stage (usually a text encoder), `__is_first_stage__` or
            `__is_unconditional__`. State-dict keys of a `GeneralConditioner` have the prefix `conditioner`, as in SDXL.
            Keys of other cond stages have the prefix `cond_stage_model`.
        num_timesteps_cond: number of timesteps of noise on the conditioning; 1 for no noise.
        cond_stage_key: batch entry that conditions the model.
        cond_stage_trainable: train the cond stage too.
        unet_trainable: train the UNet: all of it for true or `all`, its attention to the context for `attn`, its first
            convolution for `conv_in`. If false, it is frozen, and only gradients pass through it to the cond stage.
        lora: settings of `ldm.modules.lora.adapt`: train a LoRA of the UNet in place of its weights.
        trained_parts: choice among these parameters, and their learning rates; arguments of `TrainedParts`.
        concat_mode: default of `conditioning_key`: `concat` if true, else `crossattn`.
        cond_stage_forward: method of the cond stage to call in place of `encode` or `forward`.
        concat_keys: batch entries, channels first, that are concatenated to the input for `hybrid`.
        force_null_conditioning: keep `conditioning_key` with `__is_unconditional__` and use the batch entry unencoded.
        scale_factor: factor of the latents.
        scale_by_std: set `scale_factor` to 1 / standard deviation of the latents of the first batch.
        prior_loss_weight: weight of the loss of prior samples; see `Prior`.
        prior_target: target of prior samples: `data` as for other samples, or the stored prediction of a `teacher`.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = 1,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        unet_trainable: bool | str = True,
        lora: Mapping[str, Any] | None = None,
        trained_parts: Mapping[str, Any] | None = None,
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
        self.clip_denoised = False  # latents are not bounded, unlike pixels
        self.cond_stage_key, self.cond_stage_forward = cond_stage_key, cond_stage_forward
        self.cond_stage_trainable, self.unet_trainable = cond_stage_trainable, unet_trainable
        self.prior_loss_weight, self.prior_target = prior_loss_weight, prior_target
        self.num_timesteps_cond = 1 if num_timesteps_cond is None else num_timesteps_cond
        self.concat_keys = self.default_concat_keys if concat_keys is None else tuple(concat_keys)
        check_number("scale_factor", scale_factor, above=0, whole=False)
        self._check_settings()
        self.model.train_only(unet_trainable)
        if lora is not None:
            train_lora(self, lora, trained_parts)
        self._register_scale(scale_factor, scale_by_std)
        self._register_cond_ids()
        self.first_stage_model = instantiate_from_config(first_stage_config).requires_grad_(False)
        self._add_cond_stage(cond_stage_config)
        self.trained_parts = parts_of(trained_parts)
        self.trained_parts.freeze(self)
        self.train()
        if ckpt_path is not None:  # after both stages, so that their weights are loaded too
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def _check_settings(self) -> None:
        """Raise `UserError` for the first setting that is out of range or contradicts another."""
        steps = self.num_timesteps_cond
        check_number("num_timesteps_cond", steps, least=1, most=self.num_timesteps)
        check_prior_settings(self.prior_loss_weight, self.prior_target)
        trains = self.unet_trainable or self.cond_stage_trainable or list(self.parameters(recurse=False))
        refuse_if(
            self.prior_target == "teacher" and steps > 1,
            f"prior_target: teacher has predictions for clean captions, but num_timesteps_cond: {steps} adds noise "
            "to captions; set num_timesteps_cond: 1 or prior_target: data",
        )
        refuse_if(
            self.prior_target == "teacher" and isinstance(self.timestep_distribution, LossAware),
            "timestep_config: LossAware chooses timesteps, but prior_target: teacher has predictions at other "
            "timesteps; set prior_target: data or choose another distribution",
        )
        refuse_if(
            self.weighting.reads_predictions
            and (steps > 1 or self.training_noise is not PLAIN_NOISE or not self.timestep_distribution.is_plain),
            "loss_config: DirectConsistency has predictions at stored timesteps and noises, for clean captions; "
            "leave out timestep_config, noise_config and num_timesteps_cond",
        )
        refuse_if(
            steps > 1 and isinstance(self.timestep_distribution, Split),
            f"timestep_config: Split gives prior samples other timesteps than num_timesteps_cond: {steps} adds "
            "noise to captions for; set num_timesteps_cond: 1 or choose another distribution",
        )
        refuse_if(
            self.use_ema and not self.unet_trainable,
            "use_ema: true averages the UNet, which unet_trainable: false freezes; set use_ema: false",
        )
        refuse_if(not trains, "unet_trainable: false leaves nothing to train; set cond_stage_trainable: true")

    def _register_scale(self, scale_factor: float, by_std: bool) -> None:
        """Set the factor of the latents: a number, or a buffer that the first batch sets."""
        self.scale_by_std = by_std
        self._scale_is_loaded = False
        if by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor

    def _register_cond_ids(self) -> None:
        """Register the timestep of the conditioning's noise for each timestep of the latent."""
        if self.num_timesteps_cond > 1:
            last, count = self.num_timesteps - 1, self.num_timesteps_cond
            ids = torch.full((self.num_timesteps,), last, dtype=torch.long)
            ids[:count] = torch.linspace(0, last, count).round().long()
            self.register_buffer("cond_ids", ids, persistent=False)

    def _add_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        """Build the cond stage under the state-dict keys of its releases, and freeze it unless it is trainable."""
        with located("cond_stage_config"):
            stage = self.first_stage_model if config == "__is_first_stage__" else instantiate_from_config(config)
        if isinstance(stage, GeneralConditioner):
            self.conditioner = stage
            object.__setattr__(self, "cond_stage_model", stage)  # not a submodule, so that it adds no keys
        else:
            self.cond_stage_model = stage
        if stage is not None:
            stage.requires_grad_(self.cond_stage_trainable)
        refuse_if(
            self.cond_stage_trainable and isinstance(stage, GeneralConditioner) and not stage.is_trainable,
            "cond_stage_trainable: true, but no embedder of cond_stage_config has is_trainable: true",
        )

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set training mode. Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if not self.unet_trainable:
            self.model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def trained_parameters(self) -> list[nn.Parameter]:
        parts = [self.model, self.cond_stage_model] if self.cond_stage_trainable else [self.model]
        found = chain(*(part.parameters() for part in parts), self.parameters(recurse=False))
        return [parameter for parameter in found if parameter.requires_grad]

    # Batches

    def check_batch_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check the shapes of a pre-encoded sample, by batch entry and without the batch dimension.

        Raises:
            UserError: an entry has a shape that the model does not take.
        """
        latent = shapes.get(self.first_stage_key)
        if latent is not None:
            self._check_latent_shape(tuple(latent))
        context, width = shapes.get(self.cond_stage_key), getattr(self.model.diffusion_model, "context_dim", None)
        refuse_if(
            context is not None and width is not None and self.model.conditioning_key is None,
            f"the UNet has a context_dim of {width}, but cond_stage_config: __is_unconditional__ gives it no "
            "context; leave unet_config.params.context_dim out, or name a cond_stage_config",
        )
        if context is not None and width is not None and (len(context) != 2 or context[1] != width):
            raise UserError(
                f"{self.cond_stage_key} has shape {tuple(context)}, but the UNet's context_dim is {width}; "
                "encode the captions with this model's text encoder"
            )
        self.check_vector(shapes)
        self.check_input_channels(shapes)

    def _check_latent_shape(self, shape: tuple[int, ...]) -> None:
        factor = getattr(self.model.diffusion_model, "downsampling", 1)
        name = f"{self.first_stage_key} has shape {shape}"
        refuse_if(
            len(shape) != 3 or shape[0] not in (self.channels, 2 * self.channels),
            f"{name}; the model takes a posterior's mean and log variance, ({2 * self.channels}, h, w), or a "
            f"latent, ({self.channels}, h, w)",
        )
        refuse_if(any(size % factor for size in shape[1:]), f"{name}; h and w must be multiples of {factor}")

    # Training

    def diffused(self, batch: Batch, streams: RandomStreams = GLOBAL_STREAM) -> Tensor:
        """Return the scaled latents (B, C, h, w) of a batch."""
        return self.get_first_stage_encoding(self.encode_batch(batch), streams)

    def samples_of(self, batch: Batch) -> BatchMean:
        of_prior = self.timestep_distribution.of_prior
        return Prior.of(batch, self.prior_loss_weight, self.prior_target, of_prior) or EQUAL

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._scale_is_loaded = "scale_factor" in checkpoint["state_dict"]

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> LoadReport:
        report = super().init_from_ckpt(path, ignore_keys, only_model)
        self._scale_is_loaded = not only_model and "scale_factor" not in report.missing
        return report

    def on_train_start(self) -> None:
        """Call the cond stage's `begin_training`, if it has one, at the start of a run that is not resumed."""
        begin = getattr(self.cond_stage_model, "begin_training", None)
        if begin is not None and self.global_step == 0:
            begin()
        super().on_train_start()

    @torch.no_grad()
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.trained_parts.set_step(self, self.global_step)
        self._put_first_stage_away(batch)
        if self.scale_by_std and not self._scale_is_loaded and self.global_step == 0 and batch_idx == 0:
            self.scale_factor.fill_(1.0)
            latent = self.get_first_stage_encoding(self.encode_batch(batch))
            self.scale_factor.copy_(1.0 / mean_over_processes(latent.std()))
            logger.info("scale_factor set to %.5f from the first batch", self.scale_factor.item())

    # Images

    def encode_with_images(self, batch: Batch) -> tuple[Tensor, Conditioning, Tensor]:
        encoded = self.encode_batch(batch)
        latent, cond = self.get_first_stage_encoding(encoded), self.encode_conditioning(batch)
        if not self.is_pre_encoded(batch[self.first_stage_key]):
            return latent, cond, self.get_input(batch, self.first_stage_key)
        return latent, cond, self.to_images(self.most_likely_latent(encoded))  # approximates the original image

    def to_images(self, x: Tensor) -> Tensor:
        """Return the decoded images. One image is decoded at a time, which takes less memory than a training step."""
        return torch.cat([self.decode_first_stage(part) for part in x.split(1)])

    @wraps(DDPM.log_images)
    def log_images(self, batch: Batch, N: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        try:
            return super().log_images(batch, N, **kwargs)
        finally:
            self._put_first_stage_away(batch)
