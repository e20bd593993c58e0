"""Convolutional encoder and decoder of the first stage (Rombach et al., arXiv:2112.10752, appendix G).

Both take the whole `ddconfig`, so each accepts keys that only the other one uses. Images are (B, C, H, W)
with H and W multiples of 2^(levels - 1). Level i works at 1/2^i of that size with `ch * ch_mult[i]` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.util import refuse_if

_NORM_GROUPS = 32


def normalize(channels: int) -> nn.GroupNorm:
    """Return the group norm that precedes each convolution.

    Raises:
        UserError: `channels` is not a multiple of the 32 groups.
    """
    refuse_if(
        channels % _NORM_GROUPS,
        f"ddconfig: {channels} channels do not divide into {_NORM_GROUPS} groups; use a multiple as ch",
    )
    return nn.GroupNorm(_NORM_GROUPS, channels, eps=1e-6)


class Upsample(nn.Module):
    """Upsampling (B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, followed by a 3x3 convolution if `with_conv`."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Downsampling (B, C, H, W) -> (B, C, H/2, W/2): a strided 3x3 convolution if `with_conv`, else average pooling."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        # Released weights need padding on the right and at the bottom only, which Conv2d does not offer.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Two norm-swish-convolution steps with a shortcut: (B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions, with one head of C channels and a shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalize(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H*W, C), without storing the (H*W, H*W) matrix
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + self.proj_out(h)


class _Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if `attention`."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, dropout: float, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_blocks if attention else 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class _DownLevel(_Level):
    """Level of the encoder: its blocks, then `downsample`."""

    def __init__(self, *level: Any, downsample: nn.Module) -> None:
        super().__init__(*level)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.downsample(super().forward(x))


class _UpLevel(_Level):
    """Level of the decoder: its blocks, then `upsample`."""

    def __init__(self, *level: Any, upsample: nn.Module) -> None:
        super().__init__(*level)
        self.upsample = upsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upsample(super().forward(x))


_ATTENTION = ("vanilla", "vanilla-xformers")  # names of one network; forks compute it by other kernels


def _has_attention(attn_type: str, use_linear_attn: bool) -> bool:
    refuse_if(
        use_linear_attn or attn_type not in (*_ATTENTION, "none"),
        f"ddconfig: attn_type {attn_type!r} with use_linear_attn {use_linear_attn} is not available; "
        "use attn_type 'vanilla' or 'none', and use_linear_attn false",
    )
    return attn_type in _ATTENTION


class Encoder(nn.Module):
    """Encoder (B, in_channels, H, W) -> (B, Z, H/2^(levels-1), W/2^(levels-1)).

    Z is 2 * z_channels if double_z, else z_channels.

    Args:
        ch, ch_mult: channels of the first level, and the multiple of them in each level.
        num_res_blocks: residual blocks per level; the decoder has one more.
        attn_resolutions: sizes of the levels that have attention after each block, for an image `resolution` wide.
        attn_type: 'vanilla' or 'vanilla-xformers', which are the same network, or 'none' for no attention anywhere.
    """

    def __init__(
        self,
        *,
        ch: int,
        num_res_blocks: int,
        in_channels: int,
        z_channels: int,
        resolution: int,
        attn_resolutions: Sequence[int] = (),
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        double_z: bool = True,
        resamp_with_conv: bool = True,
        attn_type: str = "vanilla",
        use_linear_attn: bool = False,
        out_ch: int | None = None,
        give_pre_end: bool = False,
        tanh_out: bool = False,
    ) -> None:
        super().__init__()
        attention = _has_attention(attn_type, use_linear_attn)
        widths = [ch] + [ch * multiple for multiple in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList(
            _DownLevel(
                widths[i],
                widths[i + 1],
                num_res_blocks,
                dropout,
                attention and resolution // 2**i in attn_resolutions,
                downsample=Downsample(widths[i + 1], resamp_with_conv) if i < last else nn.Identity(),
            )
            for i in range(len(ch_mult))
        )
        self.mid = _Middle(widths[-1], dropout, attention)
        self.norm_out = normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Decoder (B, z_channels, h, w) -> (B, out_ch, h * 2^(levels-1), w * 2^(levels-1)).

    It takes the arguments of `Encoder`, and two more:

    Args:
        give_pre_end: stop before the last norm and convolution.
        tanh_out: limit the output to [-1, 1] by a tanh.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        num_res_blocks: int,
        z_channels: int,
        resolution: int,
        attn_resolutions: Sequence[int] = (),
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        attn_type: str = "vanilla",
        use_linear_attn: bool = False,
        in_channels: int | None = None,
        double_z: bool = True,
    ) -> None:
        super().__init__()
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        attention = _has_attention(attn_type, use_linear_attn)
        widths = [ch * multiple for multiple in ch_mult]
        widths.append(widths[-1])  # the lowest level has the width of the middle
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], dropout, attention)
        # Computed from the lowest level up, which matters if `resolution` does not halve evenly.
        last = len(ch_mult) - 1
        sizes = [resolution // 2**last * 2 ** (last - i) for i in range(len(ch_mult))]
        self.up = nn.ModuleList(
            _UpLevel(
                widths[i + 1],
                widths[i],
                num_res_blocks + 1,
                dropout,
                attention and sizes[i] in attn_resolutions,
                upsample=Upsample(widths[i], resamp_with_conv) if i > 0 else nn.Identity(),
            )
            for i in range(len(ch_mult))
        )
        self.norm_out = normalize(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
