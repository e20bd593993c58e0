"""Downward half of the UNet as a classifier or an encoder (arXiv:2105.05233, section 4.2).

B: batch. C: channels. H, W: height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.layers import conv_nd, normalization, zero_module
from ldm.modules.diffusionmodules.levels import LayerMaker, channels_down, plan_levels
from ldm.modules.diffusionmodules.trunk import UNetTrunk
from ldm.modules.diffusionmodules.unet_options import note_precision
from ldm.util import check_choice, refuse_if

_HIDDEN = 2048  # features between the two linear layers of the spatial pools
_POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class AttentionPool(nn.Module):
    """Attention pooling of a map (B, C, side, side) to (B, out_channels), with the mean of the map as the query.

    CLIP's image towers pool in the same way (arXiv:2103.00020, section 2.4).
    """

    def __init__(self, side: int, channels: int, head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = conv_nd(1, channels, 3 * channels, 1)
        self.c_proj = conv_nd(1, channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # (B, C, N)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)  # the mean is the first token
        qkv = self.qkv_proj(tokens + self.positional_embedding.to(tokens.dtype))
        q, k, v = rearrange(qkv, "b (qkv h d) n -> qkv b h n d", qkv=3, h=self.heads)
        pooled = attend(q[:, :, :1], k, v)
        return self.c_proj(rearrange(pooled, "b h n d -> b (h d) n"))[..., 0]


class EncoderUNetModel(UNetTrunk):
    """Input blocks and middle of a UNet with plain attention, pooled to (B, out_channels).

    Args:
        image_size: height and width of the input, used only by `pool: attention`.
        pool: `adaptive`, the mean over the map; `attention`, see `AttentionPool`; `spatial`, two linear layers on the
            joined means of all blocks' maps; `spatial_v2`, the same with a norm and SiLU between the layers.

    The other arguments are those of `UNetModel`.

    Raises:
        UserError: the arguments contradict each other.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool | str = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        super().__init__()
        check_choice("pool", pool, _POOLS)
        refuse_if(pool == "attention" and num_head_channels == -1, "pool 'attention' needs num_head_channels")
        note_precision(use_fp16=use_fp16)
        levels = plan_levels(model_channels, channel_mult, num_res_blocks, attention_resolutions)
        blocks = conv_resample, resblock_updown, use_scale_shift_norm, use_checkpoint
        heads = num_heads, num_head_channels, use_new_attention_order
        make = LayerMaker(4 * model_channels, dropout, dims, *blocks, *heads)
        self.pool = pool
        self.build_embeddings(model_channels)
        self.build_down(make, levels, in_channels, depth=1)
        channels = levels[-1].channels
        if pool.startswith("spatial"):
            features = sum(channels_down(levels, model_channels)) + channels
            norm = [nn.ReLU()] if pool == "spatial" else [normalization(_HIDDEN), nn.SiLU()]
            self.out = nn.Sequential(nn.Linear(features, _HIDDEN), *norm, nn.Linear(_HIDDEN, out_channels))
            return
        if pool == "attention":
            side = image_size // 2 ** (len(levels) - 1)
            pooling: list[nn.Module] = [AttentionPool(side, channels, num_head_channels, out_channels)]
        else:
            last = zero_module(conv_nd(dims, channels, out_channels, 1))
            pooling = [_ADAPTIVE_POOLS[dims](1), last, nn.Flatten()]
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), *pooling)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Encode a noisy `x` (B, in_channels, H, W) at `timesteps` (B,) to (B, out_channels)."""
        emb = self.time_embed(self.features_of(timesteps))
        h = x.to(self.dtype)
        means = []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            means.append(h.flatten(2).mean(dim=2))
        return self.out(torch.cat(means, dim=1) if self.pool.startswith("spatial") else h)


_ADAPTIVE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
