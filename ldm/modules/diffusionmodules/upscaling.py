"""Low-resolution image that conditions an upscaler, with noise that hides its defects.

B batch, C channels, H and W height and width (arXiv:2106.15282, section 3: conditioning augmentation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.layers import KeepsTypes
from ldm.modules.diffusionmodules.schedule import GaussianDiffusion, diffusion_buffers, make_beta_schedule
from ldm.util import check_keys, check_number

_SCHEDULE = {"beta_schedule": "linear", "timesteps": 1000, "linear_start": 1e-4, "linear_end": 2e-2, "cosine_s": 8e-3}
# Buffers of the schedule in the released models.
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
    """Stage that adds noise of a given level to an image, with its own schedule.

    Args:
        noise_schedule_config: values of `beta_schedule`, `timesteps`, `linear_start`, `linear_end` and `cosine_s`.
            Missing ones are those of a linear schedule of 1000 steps from 0.0001 to 0.02. None, the default, adds no
            noise.
        max_noise_level: exclusive upper limit of sampled noise levels.

    Raises:
        UserError: a key of the schedule is unknown, or `max_noise_level` is outside the schedule.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None, max_noise_level: int = 1000) -> None:
        super().__init__()
        self.max_noise_level = max_noise_level
        self.has_schedule = noise_schedule_config is not None
        if noise_schedule_config is None:
            return
        check_keys("noise_schedule_config", noise_schedule_config, _SCHEDULE)
        schedule = {**_SCHEDULE, **noise_schedule_config}
        steps = schedule.pop("timesteps")
        check_number("max_noise_level", max_noise_level, least=1, most=steps)
        betas = make_beta_schedule(schedule.pop("beta_schedule"), steps, **schedule)
        buffers = diffusion_buffers(betas)
        for name in _BUFFERS:
            self.register_buffer(name, torch.tensor(buffers[name], dtype=torch.float32))

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the noisy `x` (B, C, H, W) and its noise levels (B,), which are sampled by default."""
        if noise_level is None:
            highest = self.max_noise_level if self.has_schedule else 1
            noise_level = torch.randint(0, highest, x.shape[:1], device=x.device)
        return (self.q_sample(x, noise_level) if self.has_schedule else x), noise_level

    def decode(self, x: Tensor) -> Tensor:
        """Return the image unchanged; a model in latent space would decode it here."""
        return x


class SimpleImageConcat(LowScaleModel):
    """Low-resolution image without noise, with noise levels of 0."""

    def __init__(self) -> None:
        super().__init__(noise_schedule_config=None, max_noise_level=1)


class ImageConcatWithNoiseAugmentation(LowScaleModel):
    """Low-resolution image with noise, whose level the UNet also receives.

    Args:
        noise_schedule_config, max_noise_level: see `LowScaleModel`.
        to_cuda: accepted for old configs; the model moves together with the diffusion model.
    """

    def __init__(
        self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000, to_cuda: bool = False
    ) -> None:
        super().__init__(noise_schedule_config, max_noise_level)
