"""The denoising UNet: residual blocks with time embedding, and attention (arXiv:2105.05233; arXiv:2112.10752).

B batch, C channels, H and W height and width, E features of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module
from ldm.util import UserError

_ISOLATES = "isolate_recompiles" in signature(torch.compile).parameters  # from torch 2.13 on
_SIZES = 64  # of pictures, times the sizes of batches, that blocks are compiled for; more are hours of compiling
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_COMPILE_MODES = ("default", *_CUDA_GRAPHS, "max-autotune-no-cudagraphs")


class UNetModel(nn.Module):
    """The UNet that predicts noise, x₀ or v from a noisy (B, in_channels, H, W).

    Args:
        image_size: kept in configs as a note; any H and W that halve evenly work.
        in_channels, out_channels: of the input and the prediction.
        model_channels: channels at the first level.
        num_res_blocks: residual blocks a level, one number or one a level.
        attention_resolutions: downsampling factors at which attention is used.
        dropout: inside residual blocks.
        channel_mult: channels of each level, in units of `model_channels`.
        conv_resample: resample by learned convolutions.
        dims: spatial dimensions of the input, 1, 2 or 3.
        num_classes: if given, the model also takes class labels `y`.
        use_checkpoint: recompute activations in backward (slower, smaller); `selective`: but not convolutions, matrix
            products and attention, whose results are kept.
        num_heads: attention heads, if `num_head_channels` is -1.
        num_head_channels: features a head; -1 for a fixed number of heads.
        num_heads_upsample: heads of plain attention blocks on the way up, in the legacy layout.
        use_scale_shift_norm: the time embedding scales and shifts norms.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: of the features in plain attention blocks.
        use_fp16: accepted for old configs if false; the trainer's `precision` sets the type.
        use_spatial_transformer: transformers with `context`, instead of plain attention blocks.
        transformer_depth: transformer blocks a spatial transformer.
        context_dim: features of the context.
        legacy: head sizes as in the first release: channels / heads in spatial transformers, even if
            `num_head_channels` does not divide them.
        channels_last: lay feature maps out channels last (NHWC), which convolutions are faster in. Weights keep their
            layout, and with it checkpoints and optimizers theirs.
        compile_mode: compile each block for training, in this mode of `torch.compile`; `reduce-overhead` and
            `max-autotune` use CUDA graphs. Not for inference: pictures come in many sizes, each compiled anew.

    Raises:
        UserError: arguments that contradict each other.
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
        num_classes: int | None = None,
        use_checkpoint: bool | str = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        legacy: bool = True,
        channels_last: bool = False,
        compile_mode: str | None = None,
    ) -> None:
        super().__init__()
        if use_spatial_transformer != (context_dim is not None):
            raise UserError(
                f"use_spatial_transformer={use_spatial_transformer} and context_dim={context_dim} go together: "
                "set both, or neither"
            )
        if use_fp16:
            raise UserError("use_fp16 is not supported: leave it out, and set the trainer's precision")
        if num_heads == -1 and num_head_channels == -1:
            raise UserError("UNetModel needs num_heads or num_head_channels")
        if use_checkpoint not in (True, False, "selective"):
            raise UserError(f"use_checkpoint {use_checkpoint!r} is unknown; valid: true, false, selective")
        if channels_last and dims != 2:
            raise UserError(f"channels_last is for two spatial dimensions, and dims is {dims}; leave it out")
        if compile_mode not in (None, *_COMPILE_MODES):
            raise UserError(f"compile_mode {compile_mode!r} is unknown; valid: {', '.join(_COMPILE_MODES)}")
        blocks_per_level = (
            [num_res_blocks] * len(channel_mult) if isinstance(num_res_blocks, int) else list(num_res_blocks)
        )
        if model_channels % 32 or not channel_mult:
            raise UserError(
                f"model_channels {model_channels} must be a multiple of 32, the groups of the norms, "
                f"and channel_mult {list(channel_mult)} must not be empty"
            )
        if len(blocks_per_level) != len(channel_mult):
            raise UserError(f"num_res_blocks {blocks_per_level} needs one entry a level of channel_mult {channel_mult}")

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.context_dim = context_dim
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_mode = compile_mode
        self.downsampling = 2 ** (len(channel_mult) - 1)  # H and W must be multiples of it

        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        def residual(channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
            return ResBlock(
                channels,
                emb_channels,
                dropout,
                out_channels=out_channels,
                use_scale_shift_norm=use_scale_shift_norm,
                dims=dims,
                use_checkpoint=use_checkpoint,
                up=up,
                down=down,
            )

        def attention(channels: int, plain_heads: int = num_heads) -> nn.Module:
            if num_head_channels == -1:
                heads = num_heads if use_spatial_transformer or not legacy else plain_heads
            else:
                heads = channels // num_head_channels
            if heads < 1 or (not use_spatial_transformer and channels % heads):
                raise UserError(
                    f"{channels} channels do not divide into heads: num_heads={num_heads}, "
                    f"num_head_channels={num_head_channels}"
                )
            if not use_spatial_transformer:
                return AttentionBlock(channels, heads, use_checkpoint, use_new_attention_order)
            dim_head = channels // heads if legacy or num_head_channels == -1 else num_head_channels
            return SpatialTransformer(
                channels,
                heads,
                dim_head,
                depth=transformer_depth,
                context_dim=context_dim,
                use_checkpoint=use_checkpoint,
            )

        # Down: every block's output is kept for the way up.
        channels = model_channels
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(dims, in_channels, channels, 3, padding=1))])
        skips = [channels]
        factor = 1
        last = len(channel_mult) - 1
        for level, mult in enumerate(channel_mult):
            for _ in range(blocks_per_level[level]):
                layers: list[nn.Module] = [residual(channels, mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(channels))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(channels)
            if level != last:
                resample = (
                    residual(channels, channels, down=True)
                    if resblock_updown
                    else Downsample(channels, conv_resample, dims=dims)
                )
                self.input_blocks.append(TimestepEmbedSequential(resample))
                skips.append(channels)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(
            residual(channels, channels), attention(channels), residual(channels, channels)
        )

        # Up: each block takes the output that the way down kept, the last one first.
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(blocks_per_level[level] + 1):
                layers = [residual(channels + skips.pop(), mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(channels, plain_heads=heads_up))
                if level and index == blocks_per_level[level]:
                    layers.append(
                        residual(channels, channels, up=True)
                        if resblock_updown
                        else Upsample(channels, conv_resample, dims=dims)
                    )
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            zero_module(conv_nd(dims, model_channels, out_channels, 3, padding=1)),
        )
        if compile_mode is not None:
            blocks = (*self.input_blocks, self.middle_block, *self.output_blocks)
            for block in blocks:  # in place, so that keys stay
                block.compile(mode=compile_mode, dynamic=False, fullgraph=True, **_room_for_programs(len(blocks)))

    @property
    def dtype(self) -> torch.dtype:
        """The type that the blocks compute in."""
        return self.time_embed[0].weight.dtype

    @property
    def is_compiled(self) -> bool:
        """Whether each block is compiled for training."""
        return self.compile_mode is not None

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether the compiled blocks are replayed as CUDA graphs, whose memory stays where it is."""
        return self.compile_mode in _CUDA_GRAPHS

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """`block(*inputs)`. Every use of weights goes through here."""
        if self.is_compiled and not torch.is_grad_enabled():
            return block._call_impl(*inputs)  # uncompiled, but with hooks, which gather sharded weights
        return block(*inputs)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Predict from a noisy `x` (B, in_channels, H, W) at `timesteps` (B,), which may be fractional.

        `context` is (B, M, context_dim); `y` is (B,) class labels. The result is (B, out_channels, H, W).

        Raises:
            ValueError: `y` is given to a model without classes, or missing in one with classes.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError(f"class labels y={y} do not fit a UNetModel with num_classes={self.num_classes}")
        if self.uses_cuda_graphs and torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs made in the last step may be overwritten
        emb = self.run(self.time_embed, timestep_embedding(timesteps, self.model_channels).to(self.dtype))  # (B, E)
        if y is not None:
            emb = emb + self.run(self.label_emb, y)
        h = x.to(self.dtype).contiguous(memory_format=self.memory_format)
        context = None if context is None else context.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = self.run(block, h, emb, context)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.run(self.out, h)


def _room_for_programs(blocks: int) -> dict[str, bool]:
    """Arguments of `torch.compile` for `blocks` of one class, which by default share a stock of a few programs.

    Each block has one for every size of picture, and at the end of its stock training would stop.
    """
    limits = torch._dynamo.config
    each = 1 if _ISOLATES else blocks
    limits.recompile_limit = max(limits.recompile_limit, _SIZES * each)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _SIZES * blocks)
    return {"isolate_recompiles": True} if _ISOLATES else {}
