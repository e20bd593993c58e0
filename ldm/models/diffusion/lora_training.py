"""Training of a LoRA of the UNet, in place of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.modules.ema import LitEma
from ldm.modules.lora import adapt
from ldm.util import refuse_if


def train_lora(model: Any, settings: Mapping[str, Any], trained_parts: Mapping[str, Any] | None) -> None:
    """Add the factors of a LoRA with these `settings` to the UNet of a `LatentDiffusion`, and freeze its weights.

    Raises:
        UserError: another setting of the model chooses weights to train, or `settings` are invalid; see `adapt`.
    """
    refuse_if(
        model.unet_trainable not in (True, "all"),
        f"lora trains factors in place of weights, and unet_trainable: {model.unet_trainable} selects weights; "
        "leave unet_trainable out",
    )
    refuse_if(
        model.cond_stage_trainable,
        "lora trains factors of the UNet alone, and cond_stage_trainable: true the text encoder or a word, "
        "which no LoRA file would hold; set cond_stage_trainable: false",
    )
    refuse_if(
        trained_parts is not None,
        "lora trains factors in place of weights, and trained_parts chooses weights; leave one of them out",
    )
    adapt(model.model.diffusion_model, settings)
    if model.use_ema:
        model.model_ema = LitEma(model.model)  # of the factors alone
