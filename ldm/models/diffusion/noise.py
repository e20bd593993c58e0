"""Noise of training, chosen by `noise_config`. Validation and sampling have plain Gaussian noise.

B: batch. C, h, w: channels, height and width of x, the clean batch (B, C, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.random_streams import RandomStreams
from ldm.util import check_number, instantiate_from_config, refuse_if


class TrainingNoise:
    """Gaussian noise, with low frequencies and a perturbation of the input as chosen.

    Args:
        offset: factor s of a number z per sample and channel: ε + s z. It lets the model change the mean brightness of
            an image (N. Guttenberg, "Diffusion with Offset Noise", 2023). A usual value is 0.05 to 0.1.
        pyramid: factor d per level of noise at lower resolutions: Σ dⁱ up(εᵢ), with εᵢ of size h / 2ⁱ × w / 2ⁱ, divided
            by the standard deviation of each sample (J. Whitaker, "Multi-Resolution Noise for Diffusion Model
            Training", 2023). A usual value is 0.3.
        levels: number of lower resolutions, if the image is large enough.
        perturbation: factor γ of noise ξ in the model's input only: x_t of ε + γ ξ, with the target of ε
            (arXiv:2301.11706). A usual value is 0.1.

    Raises:
        UserError: a factor is negative, `pyramid` is above 1, or `levels` is not a whole number above 0.
    """

    def __init__(self, offset: float = 0.0, pyramid: float = 0.0, levels: int = 6, perturbation: float = 0.0) -> None:
        check_number("offset", offset, least=0, whole=False)
        check_number("pyramid", pyramid, least=0, most=1, whole=False)
        check_number("levels", levels, least=1)
        check_number("perturbation", perturbation, least=0, whole=False)
        self.offset, self.pyramid, self.levels, self.perturbation = offset, pyramid, levels, perturbation

    def sample(self, x: Tensor, streams: RandomStreams) -> tuple[Tensor, Tensor | None]:
        """Return the noise (B, C, h, w) of the target, and what the input has in addition, or None."""
        noise = streams.normal("noise", x)
        if self.pyramid:
            noise = self._with_levels(noise, streams)
        if self.offset:
            noise = noise + self.offset * streams.normal("noise offset", x[:, :, :1, :1])
        return noise, self.perturbation * streams.normal("perturbation", x) if self.perturbation else None

    def _with_levels(self, noise: Tensor, streams: RandomStreams) -> Tensor:
        size = height, width = noise.shape[2:]
        for level in range(1, self.levels + 1):
            step = 2**level
            if min(size) < step:
                break
            coarse = streams.normal(f"noise level {level}", noise[:, :, : height // step, : width // step])
            noise = noise + self.pyramid**level * F.interpolate(coarse, size=size, mode="bilinear")
        return noise / noise.std((1, 2, 3), keepdim=True)


PLAIN_NOISE = TrainingNoise()


def noise_of(config: Mapping[str, Any] | None) -> TrainingNoise:
    """Return the noise of `noise_config`, by default plain.

    Raises:
        UserError: the config does not name a kind of noise.
    """
    if not config:
        return PLAIN_NOISE
    noise = instantiate_from_config(config)
    refuse_if(
        not isinstance(noise, TrainingNoise),
        f"noise_config: {config['target']} is not a kind of noise; {__name__} has TrainingNoise",
    )
    return noise
