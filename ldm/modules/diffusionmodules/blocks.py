"""Layers of the denoising UNet: resampling, residual blocks with time embedding, and plain attention.

B: batch. C: channels. H, W: height and width. N: positions. E: features of the time embedding. Residual blocks and
attention follow arXiv:2105.05233, sections 3 and 4.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer, attend
from ldm.modules.diffusionmodules.layers import avg_pool_nd, checkpoint, conv_nd, normalization, zero_module


class UNetUpsample(nn.Module):
    """Upsampling (B, C, H, W) → (B, C, 2H, 2W) by repetition, then a convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.dims = dims
        self.conv = conv_nd(dims, channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # The first of three dimensions is depth (or time), which keeps its size.
        factors = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
        return self.conv(F.interpolate(x, scale_factor=factors, mode="nearest"))


class UNetDownsample(nn.Module):
    """Downsampling (B, C, H, W) → (B, C, H/2, W/2), by a strided convolution if `use_conv`, else by averaging."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them, and a residual connection from (B, C, H, W).

    Args:
        use_scale_shift_norm: scale and shift the second norm by the embedding, instead of adding it before the norm.
        up, down: resample inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool | str = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        if up:
            self.resample: nn.Module = UNetUpsample(channels, use_conv=False, dims=dims)
        elif down:
            self.resample = UNetDownsample(channels, use_conv=False, dims=dims)
        else:
            self.resample = nn.Identity()
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, x, emb, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        x = self.resample(x)
        emb_out = self.emb_layers(emb)
        emb_out = emb_out[(...,) + (None,) * (h.ndim - 2)]  # (B, C) → (B, C, 1, 1)
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map (B, C, …), with a residual connection.

    Args:
        use_new_attention_order: order the 3C features by q, k, v and then by head, instead of by head and then q, k, v.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        use_checkpoint: bool | str = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.order = "b (qkv h d) n -> qkv b h n d" if use_new_attention_order else "b (h qkv d) n -> qkv b h n d"
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, x, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # (B, C, N)
        q, k, v = rearrange(self.qkv(self.norm(tokens)), self.order, qkv=3, h=self.num_heads)
        h = rearrange(attend(q, k, v), "b h n d -> b (h d) n")
        return (tokens + self.proj_out(h)).view_as(x)


class TimestepEmbedSequential(nn.Sequential):
    """Sequence that passes the time embedding and the context to the layers that need them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, *conditioning_of(layer, emb, context))
        return x


def conditioning_of(layer: nn.Module, emb: Tensor, context: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the arguments of `layer` besides the feature map."""
    if isinstance(layer, ResBlock):
        return (emb,)
    return (context,) if isinstance(layer, SpatialTransformer) else ()
