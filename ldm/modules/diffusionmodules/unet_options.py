"""Checks of single UNet options, and log lines for options without effect."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldm.util import UserError

logger = logging.getLogger(__name__)

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_COMPILE_MODES = ("default", *CUDA_GRAPHS, "max-autotune-no-cudagraphs")
_ATTENTION_TYPES = ("softmax", "softmax-xformers")  # two kernels for one function; torch chooses the kernel here


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


def check_options(
    use_spatial_transformer: bool,
    context_dim: int | None,
    num_heads: int,
    num_head_channels: int,
    use_checkpoint: bool | str,
) -> None:
    """Raise `UserError` for options that contradict each other."""
    if use_spatial_transformer != (context_dim is not None):
        raise UserError(
            f"use_spatial_transformer={use_spatial_transformer} and context_dim={context_dim} go together: "
            "set both, or neither"
        )
    if num_heads == -1 and num_head_channels == -1:
        raise UserError("UNetModel needs num_heads or num_head_channels")
    if use_checkpoint not in (True, False, "selective"):
        raise UserError(f"use_checkpoint {use_checkpoint!r} is unknown; valid: true, false, selective")


def check_kernels(attention_type: str, compile_mode: str | None, channels_last: bool, dims: int) -> None:
    """Raise `UserError` for an unknown kernel or memory layout."""
    if attention_type not in _ATTENTION_TYPES:
        raise UserError(
            f"spatial_transformer_attn_type {attention_type!r} is unknown; valid: {', '.join(_ATTENTION_TYPES)}"
        )
    if channels_last and dims != 2:
        raise UserError(f"channels_last is for two spatial dimensions, and dims is {dims}; leave it out")
    if compile_mode not in (None, *_COMPILE_MODES):
        raise UserError(f"compile_mode {compile_mode!r} is unknown; valid: {', '.join(_COMPILE_MODES)}")


def note_precision(**switches: bool) -> None:
    """Log that each active entry of `switches` has no effect, since the trainer's precision sets the type."""
    for name, is_on in switches.items():
        if is_on:
            logger.info("%s: true has no effect; --precision sets the type that the UNet computes in", name)
