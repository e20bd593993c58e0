"""Transformer of OpenAI's and OpenCLIP's models (arXiv:2103.00020, section 2.4), under their state-dict keys.

B batch, L tokens, D features.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    """x · σ(1.702 x), the activation of OpenAI's models instead of the GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ClipAttention(nn.Module):
    """Multi-head self-attention (B, L, D) → (B, L, D); with `causal`, no token attends to a later one."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b l (qkv h d) -> qkv b h l d", qkv=3, h=self.heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(h, "b h l d -> b l (h d)"))


class ClipBlock(nn.Module):
    """Self-attention and two linear layers, each with a norm before it and a residual connection."""

    def __init__(self, width: int, heads: int, causal: bool, quick_gelu: bool, mlp_width: int | None = None) -> None:
        super().__init__()
        mlp_width = mlp_width or 4 * width
        self.ln_1 = nn.LayerNorm(width)
        self.attn = ClipAttention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, mlp_width),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(mlp_width, width),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
    """Sequence of `layers` blocks: (B, L, D) → (B, L, D)."""

    def __init__(
        self, width: int, heads: int, layers: int, causal: bool, quick_gelu: bool, mlp_width: int | None = None
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads, causal, quick_gelu, mlp_width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x
