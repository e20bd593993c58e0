"""Layers of a UNet, level by level: the plan, checked, and the blocks that it describes.

A level is one resolution of the feature map. The way down halves the resolution at each level; the way up doubles it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import (
    AttentionBlock,
    ResBlock,
    TimestepEmbedSequential,
    UNetDownsample,
    UNetUpsample,
)
from ldm.modules.diffusionmodules.layers import conv_nd
from ldm.util import UserError, refuse_if


@dataclass(frozen=True)
class Level:
    """Channels, residual blocks and attention of one level. The way up has one more residual block than the way down.

    On both ways, attention with `depth` transformer blocks follows the first `attention_blocks` residual blocks.
    """

    channels: int
    blocks: int
    attention_blocks: int
    depth: int
    disable_self_attn: bool


def plan_levels(
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int | Sequence[int],
    attention_resolutions: Sequence[int],
    num_attention_blocks: Sequence[int] | None = None,
    transformer_depth: int | Sequence[int] = 1,
    disable_self_attentions: Sequence[bool] | None = None,
) -> list[Level]:
    """Return the levels for `UNetModel`'s arguments of these names, from the finest to the coarsest.

    Raises:
        UserError: an argument does not have one entry per level, or has an invalid value.
    """
    if model_channels % 32 or not channel_mult:
        raise UserError(
            f"model_channels {model_channels} must be a multiple of 32, the groups of the norms, "
            f"and channel_mult {list(channel_mult)} must not be empty"
        )
    blocks = _per_level("num_res_blocks", num_res_blocks, channel_mult)
    depths = _per_level("transformer_depth", transformer_depth, channel_mult)
    disabled = _per_level("disable_self_attentions", disable_self_attentions or False, channel_mult, is_switch=True)
    everywhere = [count + 1 for count in blocks]
    attention = everywhere
    if num_attention_blocks is not None:
        attention = _per_level("num_attention_blocks", num_attention_blocks, channel_mult)
        exceeds = any(count > limit for count, limit in zip(attention, blocks, strict=True))
        refuse_if(exceeds, f"num_attention_blocks {attention} exceeds num_res_blocks {blocks} in a level; lower it")
    return [
        Level(mult * model_channels, blocks[i], attention[i] if 2**i in attention_resolutions else 0, *both)
        for i, (mult, *both) in enumerate(zip(channel_mult, depths, disabled, strict=True))
    ]


def _per_level(name: str, given: Any, channel_mult: Sequence[int], is_switch: bool = False) -> list[int]:
    values = [given] * len(channel_mult) if isinstance(given, int) else list(given)
    right = all(isinstance(value, int) and isinstance(value, bool) is is_switch and value >= 0 for value in values)
    refuse_if(not right, f"{name} {given!r}: give {'true or false' if is_switch else 'whole numbers from 0'}")
    refuse_if(
        len(values) != len(channel_mult),
        f"{name} {values} needs one entry per level of channel_mult {list(channel_mult)}",
    )
    return values


@dataclass(frozen=True)
class LayerMaker:
    """Factory of a UNet's layers with common options; see `UNetModel` for their meaning."""

    emb_channels: int
    dropout: float
    dims: int
    conv_resample: bool
    resblock_updown: bool
    use_scale_shift_norm: bool
    use_checkpoint: bool | str
    num_heads: int
    num_head_channels: int
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    use_linear_in_transformer: bool = False
    context_dim: int | None = None
    legacy: bool = True

    def residual(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        """Return a residual block that resamples if `up` or `down`."""
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def resampling(self, channels: int, up: bool) -> nn.Module:
        """Return the layer that doubles or halves the resolution."""
        if self.resblock_updown:
            return self.residual(channels, channels, up=up, down=not up)
        return (UNetUpsample if up else UNetDownsample)(channels, self.conv_resample, dims=self.dims)

    def attention(
        self, channels: int, depth: int, disable_self_attn: bool = False, plain_heads: int | None = None
    ) -> nn.Module:
        """Return a spatial transformer, or a plain attention block with `plain_heads` in the legacy layout."""
        heads = self._heads(channels, plain_heads)
        if not self.use_spatial_transformer:
            return AttentionBlock(channels, heads, self.use_checkpoint, self.use_new_attention_order)
        divides_channels = self.legacy or self.num_head_channels == -1
        return SpatialTransformer(
            channels,
            heads,
            channels // heads if divides_channels else self.num_head_channels,
            depth=depth,
            context_dim=self.context_dim,
            use_checkpoint=self.use_checkpoint,
            use_linear=self.use_linear_in_transformer,
            disable_self_attn=disable_self_attn,
        )

    def _heads(self, channels: int, plain_heads: int | None) -> int:
        if self.num_head_channels != -1:
            heads = channels // self.num_head_channels
        elif self.use_spatial_transformer or not self.legacy or plain_heads is None:
            heads = self.num_heads
        else:
            heads = plain_heads
        refuse_if(
            not 1 <= heads <= channels or (not self.use_spatial_transformer and channels % heads),
            f"{channels} channels do not divide into heads: num_heads={self.num_heads}, "
            f"num_head_channels={self.num_head_channels}",
        )
        return heads


def way_down(make: LayerMaker, levels: Sequence[Level], in_channels: int, model_channels: int) -> nn.ModuleList:
    """Return the input blocks: the first convolution, then the levels with a downsampling between them."""
    channels = model_channels
    first = conv_nd(make.dims, in_channels, channels, 3, padding=1)
    blocks = nn.ModuleList([TimestepEmbedSequential(first)])
    for level in levels:
        for index in range(level.blocks):
            layers: list[nn.Module] = [make.residual(channels, level.channels)]
            channels = level.channels
            if index < level.attention_blocks:
                layers.append(make.attention(channels, level.depth, level.disable_self_attn))
            blocks.append(TimestepEmbedSequential(*layers))
        if level is not levels[-1]:
            blocks.append(TimestepEmbedSequential(make.resampling(channels, up=False)))
    return blocks


def channels_down(levels: Sequence[Level], model_channels: int) -> Iterator[int]:
    """Yield the output channels of each input block."""
    channels = model_channels
    yield channels
    for level in levels:
        channels = level.channels if level.blocks else channels
        yield from [channels] * level.blocks
        if level is not levels[-1]:
            yield channels


def way_up(
    make: LayerMaker, levels: Sequence[Level], model_channels: int, num_heads_upsample: int = -1
) -> nn.ModuleList:
    """Return the output blocks. Each also takes the output of an input block, from the last to the first."""
    skips = list(channels_down(levels, model_channels))
    channels = skips[-1]
    heads_up = make.num_heads if num_heads_upsample == -1 else num_heads_upsample
    blocks = nn.ModuleList()
    for level in reversed(levels):
        for index in range(level.blocks + 1):
            layers: list[nn.Module] = [make.residual(channels + skips.pop(), level.channels)]
            channels = level.channels
            if index < level.attention_blocks:
                layers.append(make.attention(channels, level.depth, level.disable_self_attn, plain_heads=heads_up))
            if level is not levels[0] and index == level.blocks:
                layers.append(make.resampling(channels, up=True))
            blocks.append(TimestepEmbedSequential(*layers))
    return blocks


def middle(
    make: LayerMaker, channels: int, depth: int, disable_self_attn: bool = False, has_attention: bool = True
) -> TimestepEmbedSequential:
    """Return the block between the two ways. Without attention its layers keep their numbers."""
    first = make.residual(channels, channels)
    attention = make.attention(channels, depth, disable_self_attn) if has_attention else nn.Identity()
    return TimestepEmbedSequential(first, attention, make.residual(channels, channels))
