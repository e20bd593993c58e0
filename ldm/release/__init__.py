"""Checkpoints between formats. Importing this package imports no torch."""

from pathlib import Path

# Path of the released weights in the tutorials of 2022.
CONVENTIONAL_RELEASE = Path("models/ldm/stable-diffusion-v1/model.ckpt")
