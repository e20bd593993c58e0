"""Denoising UNet: residual blocks with time embedding, and attention (arXiv:2105.05233; arXiv:2112.10752).

B: batch. C: channels. H, W: height and width. E: features of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.blocks import AttentionBlock  # noqa: F401  public under this module's name too
from ldm.modules.diffusionmodules.encoder_unet import EncoderUNetModel  # noqa: F401
from ldm.modules.diffusionmodules.labels import check_labels, label_features
from ldm.modules.diffusionmodules.layers import conv_nd, normalization, zero_module
from ldm.modules.diffusionmodules.levels import LayerMaker, plan_levels, way_up
from ldm.modules.diffusionmodules.trunk import UNetTrunk
from ldm.modules.diffusionmodules.unet_options import (
    CUDA_GRAPHS,
    check_heads,
    check_kernels,
    note_precision,
    one_width,
)

_ISOLATES = "isolate_recompiles" in signature(torch.compile).parameters  # from torch 2.13 on
_SIZES = 64  # number of image and batch sizes to compile for; more would take hours


class UNetModel(UNetTrunk):
    """UNet that predicts noise, x₀ or v from a noisy (B, in_channels, H, W).

    Args:
        image_size: accepted for configs and not used; any H and W that halve evenly work.
        in_channels, out_channels: channels of the input and of the prediction.
        model_channels: channels at the first level.
        num_res_blocks: residual blocks per level, one number or one per level.
        attention_resolutions: downsampling factors at which attention is used.
        dropout: dropout rate inside residual blocks.
        channel_mult: channels of each level, as a multiple of `model_channels`.
        conv_resample: resample by learned convolutions.
        dims: spatial dimensions of the input, 1, 2 or 3.
        num_classes: kind of the labels `y`. A number is the number of classes. `continuous` is for numbers (B, 1),
            `timestep` for timesteps (B,), `sequential` for vectors (B, adm_in_channels), None for no labels.
        use_checkpoint: recompute activations in backward (slower, less memory); `selective` keeps the results of
            convolutions, matrix products and attention.
        use_fp16, use_bf16: accepted without effect; the trainer's `precision` sets the type.
        num_heads: attention heads, if `num_head_channels` is -1.
        num_head_channels: features per head; -1 for a fixed number of heads.
        num_heads_upsample: heads of plain attention blocks on the way up, in the legacy layout.
        use_scale_shift_norm: scale and shift norms by the time embedding.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: see `AttentionBlock`.
        use_spatial_transformer: use transformers with `context` instead of plain attention blocks.
        transformer_depth: transformer blocks per spatial transformer, one number or one per level.
        transformer_depth_middle: transformer blocks in the middle; by default as in the last level.
        context_dim: features of the context. All entries of a list must be equal.
        n_embed: predict the logits of this many codebook entries, (B, n_embed, H, W), instead.
        legacy: use the head sizes of the first release: channels / heads in spatial transformers, even if
            `num_head_channels` does not divide them.
        disable_self_attentions: per level, attend to the context instead of self-attention.
        num_attention_blocks: per level, number of residual blocks with attention, from the first on; all by default.
        disable_middle_self_attn: in the middle, attend to the context instead of self-attention.
        disable_middle_transformer: use no attention in the middle.
        use_linear_in_transformer: project by linear layers instead of convolutions in spatial transformers.
        spatial_transformer_attn_type: `softmax` or `softmax-xformers`, which have the same effect.
        adm_in_channels: features of `y`, for `num_classes: sequential`.
        channels_last: lay feature maps out channels last (NHWC), for faster convolutions. The layout of weights,
            checkpoints and optimizers does not change.
        compile_mode: compile each block for training, in this mode of `torch.compile`; `reduce-overhead` and
            `max-autotune` use CUDA graphs. Inference is not compiled, since each image size would need its own program.

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
        num_classes: int | str | None = None,
        use_checkpoint: bool | str = False,
        use_fp16: bool = False,
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        disable_middle_transformer: bool = False,
        use_linear_in_transformer: bool = False,
        spatial_transformer_attn_type: str = "softmax",
        adm_in_channels: int | None = None,
        transformer_depth_middle: int | None = None,
        channels_last: bool = False,
        compile_mode: str | None = None,
    ) -> None:
        super().__init__()
        context_dim = one_width(context_dim)
        check_heads(use_spatial_transformer, context_dim, num_heads, num_head_channels)
        check_kernels(spatial_transformer_attn_type, use_checkpoint, compile_mode, channels_last, dims)
        note_precision(use_fp16=use_fp16, use_bf16=use_bf16)
        attention = num_attention_blocks, transformer_depth, disable_self_attentions
        levels = plan_levels(model_channels, channel_mult, num_res_blocks, attention_resolutions, *attention)
        blocks = conv_resample, resblock_updown, use_scale_shift_norm, use_checkpoint
        heads = num_heads, num_head_channels, use_new_attention_order
        transformers = use_spatial_transformer, use_linear_in_transformer, context_dim, legacy
        make = LayerMaker(4 * model_channels, dropout, dims, *blocks, *heads, *transformers)
        self.in_channels, self.out_channels, self.context_dim = in_channels, out_channels, context_dim
        self.num_classes, self.compile_mode = num_classes, compile_mode
        self.adm_in_channels = adm_in_channels if num_classes == "sequential" else None
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.downsampling = 2 ** (len(levels) - 1)  # H and W must be multiples of this number
        self.build_embeddings(model_channels, num_classes, adm_in_channels)
        depth = levels[-1].depth if transformer_depth_middle is None else transformer_depth_middle
        self.build_down(make, levels, in_channels, depth, disable_middle_self_attn, not disable_middle_transformer)
        self.output_blocks = way_up(make, levels, model_channels, num_heads_upsample)
        self._build_head(levels[0].channels, dims, n_embed)
        self._compile_blocks()

    def _build_head(self, channels: int, dims: int, n_embed: int | None) -> None:
        """Add the layers that make the prediction, and those of `n_embed` logits if it is given."""
        last = zero_module(conv_nd(dims, channels, self.out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), last)
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(channels), conv_nd(dims, channels, n_embed, 1))

    def _compile_blocks(self) -> None:
        """Compile each block, if `compile_mode` is set."""
        if self.compile_mode is None:
            return
        blocks = (*self.input_blocks, self.middle_block, *self.output_blocks)
        for block in blocks:  # in place, so that the keys do not change
            block.compile(mode=self.compile_mode, dynamic=False, fullgraph=True, **_room_for_programs(len(blocks)))

    @property
    def is_compiled(self) -> bool:
        """True if each block is compiled for training."""
        return self.compile_mode is not None

    @property
    def uses_cuda_graphs(self) -> bool:
        """True if the compiled blocks are replayed as CUDA graphs, whose memory has fixed addresses."""
        return self.compile_mode in CUDA_GRAPHS

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """Return `block(*inputs)`. The model uses weights only through this method."""
        if self.is_compiled and not torch.is_grad_enabled():
            return block._call_impl(*inputs)  # uncompiled, but with the hooks that gather partitioned weights
        return block(*inputs)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Predict from a noisy `x` (B, in_channels, H, W) at `timesteps` (B,), which may be fractional.

        `context` is (B, M, context_dim). `y` are the labels for `num_classes`, (B,) or (B, features). The result is
        (B, out_channels, H, W).

        Raises:
            ValueError: `y` is given to a model without classes, or missing in one with classes.
        """
        check_labels(y, len(x), self.num_classes, self.adm_in_channels)
        if self.uses_cuda_graphs and torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()  # the graphs may overwrite the outputs of the last step
        emb = self.run(self.time_embed, self.features_of(timesteps))  # (B, E)
        if y is not None:
            emb = emb + self.run(self.label_emb, label_features(y, self.num_classes, self.model_channels, self.dtype))
        h = x.to(self.dtype).contiguous(memory_format=self.memory_format)
        context = None if context is None else context.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = self.run(block, h, emb, context)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.run(self.last, h)

    @property
    def last(self) -> nn.Module:
        """Layers that make the prediction from the last feature map."""
        return getattr(self, "id_predictor", self.out)


def _room_for_programs(blocks: int) -> dict[str, bool]:
    """Return arguments of `torch.compile` that give `blocks` of one class enough room for compiled programs.

    Each block needs one program per image size. By default the blocks share a limit of a few programs, and training
    stops at that limit.
    """
    limits = torch._dynamo.config
    each = 1 if _ISOLATES else blocks
    limits.recompile_limit = max(limits.recompile_limit, _SIZES * each)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _SIZES * blocks)
    return {"isolate_recompiles": True} if _ISOLATES else {}
