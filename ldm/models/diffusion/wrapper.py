"""How conditioning reaches the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import UserError, instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")


class DiffusionWrapper(nn.Module):
    """The UNet, with the conditioning put where `conditioning_key` says.

    None: nowhere. `concat`: onto the input's channels. `crossattn`: the context, concatenated along its tokens.
    `hybrid`: both. `adm`: the class labels `y`.

    Raises:
        UserError: the key is unknown.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise UserError(f"conditioning_key {conditioning_key!r} is unknown; valid: {CONDITIONING_KEYS}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict from x (B, C, H, W) at t (B,), with lists of (B, C', H, W) maps and of (B, M, D) contexts."""
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn), dim=1))
        if self.conditioning_key == "adm":
            return self.diffusion_model(x, t, y=c_crossattn[0])
        return self.diffusion_model(x, t)
