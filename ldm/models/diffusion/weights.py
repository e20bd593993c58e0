"""The weights that a diffusion model starts from, and their moving average."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ldm.checkpoint import LoadReport, load_state_dict
from ldm.checkpoint.keys import EMA, MODEL, OPTIONAL_KEYS, UNET, ema_key, has_part
from ldm.checkpoint.loading import load_into
from ldm.modules.ema import LitEma

logger = logging.getLogger(__name__)

# The first convolution, by whose channels a model that sees more than the noisy latent differs from its release.
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
FIRST_CONVOLUTION_KEYS = (FIRST_CONVOLUTION, ema_key(FIRST_CONVOLUTION))


class StartsFromWeights:
    """Mixin of a diffusion model: `model` is its UNet, `model_ema` the moving average if `use_ema`."""

    model: nn.Module
    use_ema: bool
    # How a file's weights are fitted to this model's shapes; set before `init_from_ckpt`.
    finetune_keys: Sequence[str] = ()
    keep_finetune_dims: int = 4
    make_it_fit: bool = False
    load_ema: bool = True
    reset_num_ema_updates: bool = False

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> LoadReport:
        """Load weights from a checkpoint, leaving out keys that start with one of `ignore_keys`.

        With `only_model`, just the UNet. An EMA that the file does not hold starts from the loaded weights.

        Raises:
            UserError: the file cannot be read, or does not fit this model.
        """
        ignored = (*ignore_keys, *(() if self.load_ema else (EMA,)))
        module, prefix = (self.model, MODEL) if only_model else (self, "")
        weights = {
            key: self._fitted(key, value)
            for key, value in load_state_dict(path).items()
            if key.startswith(prefix) and not key.startswith(ignored)
        }
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        optional = (*OPTIONAL_KEYS, *(f"{key}*" for key in ignored))
        report = load_into(module, weights, source=str(path), optional=optional)
        if only_model or has_part(report.missing, EMA):
            self.restart_ema()
        elif self.use_ema and self.reset_num_ema_updates:
            self.model_ema.num_updates.zero_()
        return report

    def _fitted(self, key: str, value: Tensor) -> Tensor:
        """Return `value`, or where the model's tensor `key` has another shape and may be fitted, that shape."""
        own = self.state_dict().get(key) if key in self.finetune_keys or self.make_it_fit else None
        if own is None or own.shape == value.shape or own.ndim != value.ndim:
            return value
        if key not in self.finetune_keys:
            logger.info("%s: %s repeated to fill %s", key, tuple(value.shape), tuple(own.shape))
            return _repeated(value, own.shape)
        kept = min(self.keep_finetune_dims, value.shape[1], own.shape[1])
        logger.info("%s: the first %d input channels are the file's, the other %d start at 0", key, kept,
                    own.shape[1] - kept)  # fmt: skip
        fitted = torch.zeros(own.shape, dtype=value.dtype)
        fitted[:, :kept] = value[:, :kept]
        return fitted

    def restart_ema(self) -> None:
        """Begin the moving average, if there is one, at the present weights."""
        if self.use_ema:
            self.model_ema = LitEma(self.model, paths=self.model_ema.m_name2s_name)

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Return a scope in which the model has its averaged weights, if it keeps any. `context` goes to the log."""
        if not self.use_ema:
            return nullcontext()
        if context:
            logger.info("%s: with averaged weights", context)
        return self.model_ema.applied_to(self.model)


def _repeated(value: Tensor, shape: torch.Size) -> Tensor:
    """Return `value` repeated along its first two dimensions up to `shape`, so that sums over the inputs stay."""
    for dimension in range(min(2, value.ndim)):
        old, new = value.shape[dimension], shape[dimension]
        index = torch.arange(new) % old
        value = value.index_select(dimension, index)
        if dimension == 1:
            uses = torch.bincount(index, minlength=old)[index]
            value = value / uses.view(1, -1, *(1,) * (value.ndim - 2))
    return value
