"""Trunk of the UNets: time embedding, input blocks and middle block.

B: batch. C: channels. H, W: height and width. E: features of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.labels import label_embedding
from ldm.modules.diffusionmodules.layers import embedding_mlp, timestep_embedding
from ldm.modules.diffusionmodules.levels import LayerMaker, Level, middle, way_down


class UNetTrunk(nn.Module):
    """Base of networks that begin with the downward half of a UNet."""

    model_channels: int

    def build_embeddings(
        self, model_channels: int, num_classes: int | str | None = None, adm_in_channels: int | None = None
    ) -> None:
        """Add the embedding of timesteps and, with `num_classes`, of labels; see `label_embedding`."""
        self.model_channels = model_channels
        self.time_embed = embedding_mlp(model_channels, 4 * model_channels)
        if num_classes is not None:
            self.label_emb = label_embedding(num_classes, model_channels, adm_in_channels)

    def build_down(
        self,
        make: LayerMaker,
        levels: Sequence[Level],
        in_channels: int,
        depth: int,
        disable_self_attn: bool = False,
        has_attention: bool = True,
    ) -> None:
        """Add the input blocks and the middle block. The last three arguments are those of `middle`."""
        self.input_blocks = way_down(make, levels, in_channels, self.model_channels)
        self.middle_block = middle(make, levels[-1].channels, depth, disable_self_attn, has_attention)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation in the blocks."""
        return self.time_embed[0].weight.dtype

    def features_of(self, timesteps: Tensor) -> Tensor:
        """Return the sinusoidal features (B, model_channels) of `timesteps` (B,), the input of `time_embed`."""
        return timestep_embedding(timesteps, self.model_channels).to(self.dtype)
