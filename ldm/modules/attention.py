"""Attention over feature maps and text (arXiv:2112.10752, section 3.3 and appendix E.2.1).

B batch, N query tokens, M context tokens, H heads, D features per head, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.modules.cpu import is_on_cpu
from ldm.modules.diffusionmodules.convolution import Conv2d
from ldm.modules.diffusionmodules.layers import checkpoint, normalization, zero_module

# Largest number of scores per head at which plain matrix products train faster than torch's fused kernel, on a CPU in
# bfloat16. In float32, and without a backward, the fused kernel is always faster (benchmarks/cpu_attention.py).
_FEW_SCORES = 128 * 128


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D) v of queries (B, H, N, D), keys and values (B, H, M, D) (arXiv:1706.03762, eq. 1)."""
    is_few = q.shape[-2] * k.shape[-2] <= _FEW_SCORES
    if is_few and is_on_cpu(q) and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of its second half: (…, dim_in) → (…, dim_out) (arXiv:2002.05202, eq. 6)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers around a gated GELU, with 4 · dim features between them: (B, N, dim) → (B, N, dim)."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of (B, N, query_dim) to `context` (B, M, context_dim); self-attention without a context."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        context_dim = context_dim or query_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            rearrange(tokens, "b n (h d) -> b h n d", h=self.heads)
            for tokens in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context and feed-forward, each with a norm before it and a residual connection.

    Args:
        disable_self_attn: attend to the context in the first attention too.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        checkpoint: bool | str = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        first_dim = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, first_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return checkpoint(self._forward, x, context, enabled=self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (B, in_channels, H, W), with a residual connection.

    Args:
        n_heads, d_head: attention heads and features per head; the blocks are n_heads · d_head wide.
        depth: number of blocks.
        context_dim: features of the context; None for self-attention instead.
        use_checkpoint: recompute the blocks' activations in backward: all, or `selective`; see `checkpoint`.
        use_linear: project by linear layers over the tokens, instead of 1 × 1 convolutions over the map.
        disable_self_attn: see `BasicTransformerBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool | str = True,
        use_linear: bool = False,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        self.use_linear = use_linear
        self.norm = normalization(in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=context_dim,
                checkpoint=use_checkpoint,
                disable_self_attn=disable_self_attn,
            )
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.to_tokens(x)
        for block in self.transformer_blocks:
            h = block(h, context)
        return self.from_tokens(h, x)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Return the map `x` (B, in_channels, H, W) as the blocks' input (B, H · W, inner)."""
        h = self.norm(x)
        if self.use_linear:
            # Contiguous, since otherwise torch's choice of kernel depends on the weight's requires_grad.
            return self.proj_in(rearrange(h, "b c h w -> b (h w) c").contiguous())
        return rearrange(self.proj_in(h), "b c h w -> b (h w) c")

    def from_tokens(self, h: Tensor, x: Tensor) -> Tensor:
        """Add the blocks' output `h` (B, H · W, inner) to the map `x` (B, in_channels, H, W)."""
        height = x.shape[-2]
        if self.use_linear:
            return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=height)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height))
