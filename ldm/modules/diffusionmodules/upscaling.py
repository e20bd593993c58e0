"""The low-resolution image that an upscaler is conditioned on, noised so that its faults do not count.

B batch, C channels, H and W height and width (arXiv:2106.15282, section 3: conditioning augmentation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.schedule import GaussianDiffusion, diffusion_buffers, make_beta_schedule
from ldm.modules.diffusionmodules.util import KeepsTypes
from ldm.util import UserError, nearest

_SCHEDULE = {"beta_schedule": "linear", "timesteps": 1000, "linear_start": 1e-4, "linear_end": 2e-2, "cosine_s": 8e-3}
# The released models carry these of the schedule's buffers.
_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


class LowScaleModel(GaussianDiffusion, KeepsTypes, nn.Module):
    """An image and its noise level → the image noised at that level, by a schedule of its own.

    Args:
        noise_schedule_config: `beta_schedule`, `timesteps`, `linear_start`, `linear_end`, `cosine_s`, as far as they
            differ from a linear schedule of 1000 steps from 0.0001 to 0.02; None for no noise.
        max_noise_level: noise levels are sampled below it.

    Raises:
        UserError: an unknown key of the schedule, or a noise level that it does not have.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None, max_noise_level: int = 1000) -> None:
        super().__init__()
        self.max_noise_level = max_noise_level
        self.has_schedule = noise_schedule_config is not None
        if noise_schedule_config is None:
            return
        for key in noise_schedule_config:
            if key not in _SCHEDULE:
                raise UserError(f"unknown key {key!r} in noise_schedule_config{nearest(key, _SCHEDULE)}")
        schedule = {**_SCHEDULE, **noise_schedule_config}
        steps = schedule.pop("timesteps")
        if not 1 <= max_noise_level <= steps:
            raise UserError(f"max_noise_level {max_noise_level}: give 1 to timesteps ({steps})")
        betas = make_beta_schedule(schedule.pop("beta_schedule"), steps, **schedule)
        buffers = diffusion_buffers(betas)
        for name in _BUFFERS:
            self.register_buffer(name, torch.tensor(buffers[name], dtype=torch.float32))

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the noised `x` (B, C, H, W), and its noise levels (B,), sampled if they are not given."""
        if noise_level is None:
            highest = self.max_noise_level if self.has_schedule else 1
            noise_level = torch.randint(0, highest, x.shape[:1], device=x.device)
        return (self.q_sample(x, noise_level) if self.has_schedule else x), noise_level

    def decode(self, x: Tensor) -> Tensor:
        """Return the image itself, which a model in latent space would decode."""
        return x


class SimpleImageConcat(LowScaleModel):
    """The low-resolution image as it is, with noise levels of 0."""

    def __init__(self) -> None:
        super().__init__(noise_schedule_config=None, max_noise_level=1)


class ImageConcatWithNoiseAugmentation(LowScaleModel):
    """The low-resolution image with noise of a level that the UNet is told.

    Args:
        noise_schedule_config, max_noise_level: see `LowScaleModel`.
        to_cuda: accepted for old configs; the model goes where the diffusion model goes.
    """

    def __init__(
        self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000, to_cuda: bool = False
    ) -> None:
        super().__init__(noise_schedule_config, max_noise_level)
