"""Latent diffusion, lean enough to fully fine-tune on the GPU that a person owns."""

__version__ = "0.1.0"
