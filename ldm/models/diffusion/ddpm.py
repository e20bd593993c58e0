"""Public import path of the diffusion models in YAML files."""

from ldm.models.diffusion.concat import (
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    Layout2ImgDiffusion,
)
from ldm.models.diffusion.image_embedding import ImageEmbeddingConditionedLatentDiffusion
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.pixel import DDPM
from ldm.models.diffusion.wrapper import DiffusionWrapper

__all__ = [
    "DDPM",
    "DiffusionWrapper",
    "ImageEmbeddingConditionedLatentDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
    "Layout2ImgDiffusion",
]
