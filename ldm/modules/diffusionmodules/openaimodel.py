"""Denoising UNet: residual blocks with time embedding, and attention (arXiv:2105.05233; arXiv:2112.10752).

B batch, C channels, H and W height and width, E features of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.blocks import AttentionBlock  # noqa: F401  public under this module's name too
from ldm.modules.diffusionmodules.encoder_unet import EncoderUNetModel  # noqa: F401
from ldm.modules.diffusionmodules.labels import check_labels, label_embedding, label_features
from ldm.modules.diffusionmodules.levels import LayerMaker, middle, plan_levels, way_down, way_up
from ldm.modules.diffusionmodules.unet_options import (
    CUDA_GRAPHS,
    check_kernels,
    check_options,
    note_precision,
    one_width,
)
from ldm.modules.diffusionmodules.util import conv_nd, embedding_mlp, normalization, timestep_embedding, zero_module

_ISOLATES = "isolate_recompiles" in signature(torch.compile).parameters  # from torch 2.13 on
_SIZES = 64  # image sizes times batch sizes that blocks are compiled for; more would take hours


class UNetModel(nn.Module):
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
        num_classes: kind of the labels `y`: the number of classes; `continuous` for a number (B, 1); `timestep` for a
            timestep (B,); `sequential` for a vector (B, adm_in_channels); None for no labels.
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
        check_options(use_spatial_transformer, context_dim, num_heads, num_head_channels, use_checkpoint)
        check_kernels(spatial_transformer_attn_type, compile_mode, channels_last, dims)
        note_precision(use_fp16=use_fp16, use_bf16=use_bf16)
        levels = plan_levels(
            model_channels,
            channel_mult,
            num_res_blocks,
            attention_resolutions,
            num_attention_blocks,
            transformer_depth,
            disable_self_attentions,
        )
        make = LayerMaker(
            4 * model_channels,
            dropout,
            dims,
            conv_resample,
            resblock_updown,
            use_scale_shift_norm,
            use_checkpoint,
            num_heads,
            num_head_channels,
            use_new_attention_order,
            use_spatial_transformer,
            use_linear_in_transformer,
            context_dim,
            legacy,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.adm_in_channels = adm_in_channels if num_classes == "sequential" else None
        self.context_dim = context_dim
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_mode = compile_mode
        self.downsampling = 2 ** (len(levels) - 1)  # H and W must be multiples of this number

        self.time_embed = embedding_mlp(model_channels, make.emb_channels)
        if num_classes is not None:
            self.label_emb = label_embedding(num_classes, model_channels, adm_in_channels)
        self.input_blocks = way_down(make, levels, in_channels, model_channels)
        depth = levels[-1].depth if transformer_depth_middle is None else transformer_depth_middle
        self.middle_block = middle(
            make, levels[-1].channels, depth, disable_middle_self_attn, not disable_middle_transformer
        )
        self.output_blocks = way_up(make, levels, model_channels, num_heads_upsample)
        channels = levels[0].channels
        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(channels), conv_nd(dims, channels, n_embed, 1))
        if compile_mode is not None:
            self._compile_blocks()

    def _compile_blocks(self) -> None:
        blocks = (*self.input_blocks, self.middle_block, *self.output_blocks)
        for block in blocks:  # in place, so that the keys do not change
            block.compile(mode=self.compile_mode, dynamic=False, fullgraph=True, **_room_for_programs(len(blocks)))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the blocks' computation."""
        return self.time_embed[0].weight.dtype

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
            return block._call_impl(*inputs)  # uncompiled, but with the hooks that gather sharded weights
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
        emb = self.run(self.time_embed, timestep_embedding(timesteps, self.model_channels).to(self.dtype))  # (B, E)
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
