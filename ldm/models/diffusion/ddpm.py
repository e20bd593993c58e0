"""The public names of the diffusion models; YAML files name them here."""

from ldm.models.diffusion.base import DDPM
from ldm.models.diffusion.concat import (
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    Layout2ImgDiffusion,
)
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.wrapper import DiffusionWrapper

__all__ = [
    "DDPM",
    "DiffusionWrapper",
    "LatentDepth2ImageDiffusion",
    "LatentDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
    "Layout2ImgDiffusion",
]
