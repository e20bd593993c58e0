"""Checks of single UNet options, and log lines for options without effect."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldm.util import UserError, check_choice, refuse_if

logger = logging.getLogger(__name__)

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_COMPILE_MODES = ("default", *CUDA_GRAPHS, "max-autotune-no-cudagraphs")
_ATTENTION_TYPES = ("softmax", "softmax-xformers")  # two kernels of one function; torch chooses the kernel


def one_width(context_dim: int | Sequence[int] | None) -> int | None:
    """Return the features of the context. Some configs give this number once per transformer block.

    Raises:
        UserError: the entries of a list differ.
    """
    if context_dim is None or isinstance(context_dim, int):
        return context_dim
    widths = set(context_dim)
    if len(widths) != 1:
        raise UserError(f"context_dim {list(context_dim)}: all transformer blocks share one context; give one number")
    return widths.pop()


def check_heads(use_spatial_transformer: bool, context_dim: int | None, num_heads: int, num_head_channels: int) -> None:
    """Raise `UserError` for options of the attention that contradict each other."""
    refuse_if(
        use_spatial_transformer != (context_dim is not None),
        f"use_spatial_transformer={use_spatial_transformer} and context_dim={context_dim} go together: "
        "set both, or neither",
    )
    refuse_if(num_heads == -1 and num_head_channels == -1, "UNetModel needs num_heads or num_head_channels")


def check_kernels(
    attention_type: str, use_checkpoint: bool | str, compile_mode: str | None, channels_last: bool, dims: int
) -> None:
    """Raise `UserError` for an unknown kernel, checkpointing or memory layout."""
    check_choice("spatial_transformer_attn_type", attention_type, _ATTENTION_TYPES)
    refuse_if(
        channels_last and dims != 2, f"channels_last needs two spatial dimensions, but dims is {dims}; leave it out"
    )
    refuse_if(
        use_checkpoint not in (True, False, "selective"),
        f"use_checkpoint {use_checkpoint!r} is unknown; valid: true, false, selective",
    )
    if compile_mode is not None:
        check_choice("compile_mode", compile_mode, _COMPILE_MODES)


def note_precision(**switches: bool) -> None:
    """Log that each active entry of `switches` has no effect, since the trainer's precision sets the type."""
    for name, is_on in switches.items():
        if is_on:
            logger.info("%s: true has no effect; --precision sets the type that the UNet computes in", name)
