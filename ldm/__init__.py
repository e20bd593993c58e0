"""Full fine-tuning of latent diffusion models on a single consumer GPU."""

__version__ = "0.1.0"
