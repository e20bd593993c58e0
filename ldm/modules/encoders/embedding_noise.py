"""Noise on the embedding of an image, which conditions Stable unCLIP (arXiv:2204.06125, section 2.2).

B: batch. E: features of the embedding. L: features of the level of noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.modules.diffusionmodules.layers import timestep_embedding
from ldm.modules.diffusionmodules.upscaling import LowScaleModel
from ldm.modules.torch_file import read_torch_file
from ldm.util import UserError, refuse_if


class CLIPEmbeddingNoiseAugmentation(LowScaleModel):
    """Stage that scales embeddings to unit variance, adds noise of a given level, and scales them back.

    Args:
        noise_schedule_config, max_noise_level: see `LowScaleModel`.
        clip_stats_path: file of a mean (E,) and a standard deviation (E,) of embeddings, as torch saves a pair of
            tensors. It is read if it exists; without it, nothing can be embedded. None stands for 0 and 1.
        timestep_dim: L.
        to_cuda: accepted for old configs; the stage moves together with the diffusion model.
    """

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any],
        max_noise_level: int = 1000,
        to_cuda: bool = False,
        clip_stats_path: str | None = None,
        timestep_dim: int = 256,
    ) -> None:
        super().__init__(noise_schedule_config, max_noise_level)
        self.timestep_dim = timestep_dim
        self.missing_stats = None if clip_stats_path is None or Path(clip_stats_path).is_file() else clip_stats_path
        mean, std = torch.zeros(1), torch.ones(1)
        if clip_stats_path is not None and self.missing_stats is None:
            mean, std = _read_stats(clip_stats_path)
        self.register_buffer("data_mean", mean, persistent=False)
        self.register_buffer("data_std", std, persistent=False)

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the noisy embeddings (B, E), and the embedding (B, L) of their levels (B,).

        Levels and noise are sampled by default.

        Raises:
            UserError: the file of `clip_stats_path` does not exist, or is of other embeddings.
        """
        if self.missing_stats is not None:
            raise UserError(f"clip_stats_path {self.missing_stats!r}: no such file; give the one of the release")
        if self.data_mean.numel() not in (1, x.shape[1]):
            raise UserError(f"clip_stats_path: has {self.data_mean.numel()} features; the image tower has {x.shape[1]}")
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, x.shape[:1], device=x.device)
        scaled = (x - self.data_mean) / self.data_std
        noised = self.q_sample(scaled, noise_level, noise)
        return noised * self.data_std + self.data_mean, timestep_embedding(noise_level, self.timestep_dim)


def _flat_pair(content: Any) -> tuple[Tensor, Tensor]:
    mean, std = content
    return mean.detach().float().flatten(), std.detach().float().flatten()


def _read_stats(path: str) -> tuple[Tensor, Tensor]:
    fault = f"clip_stats_path {path!r}: not a pair of tensors, mean and deviation"
    mean, std = read_torch_file(path, _flat_pair, fault)
    refuse_if(
        mean.shape != std.shape or not ((std > 0) & std.isfinite() & mean.isfinite()).all(),
        f"clip_stats_path {path!r}: mean and deviation differ in shape, are not finite, or a deviation is not "
        "above 0; give the file of the release",
    )
    return mean, std
