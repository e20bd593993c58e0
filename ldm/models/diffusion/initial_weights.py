"""Initial weights of a diffusion model from a checkpoint, and their moving average."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ldm.checkpoint import LoadReport, open_checkpoint, weights_of
from ldm.checkpoint.keys import EMA, MODEL, OPTIONAL_KEYS, PREDICTION_MARKERS, UNET, ema_key, has_part
from ldm.checkpoint.loading import load_into
from ldm.checkpoint.markers import compare_markers
from ldm.modules.ema import LitEma
from ldm.util import UserError

logger = logging.getLogger(__name__)

# First convolution. Its input channels grow if maps join the noisy latent.
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
FIRST_CONVOLUTION_KEYS = (FIRST_CONVOLUTION, ema_key(FIRST_CONVOLUTION))


class InitialWeights:
    """Mixin of a diffusion model with the UNet `model` and, if `use_ema`, its moving average `model_ema`."""

    model: nn.Module
    use_ema: bool
    # Rules that fit a file's weights to this model's shapes. Set them before `init_from_ckpt`.
    finetune_keys: Sequence[str] = ()
    keep_finetune_dims: int = 4
    make_it_fit: bool = False
    load_ema: bool = True
    parameterization: str
    reset_num_ema_updates: bool = False

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> LoadReport:
        """Load weights from a checkpoint, except for keys that start with one of `ignore_keys`.

        With `only_model`, load only the UNet. If the file has no EMA, the EMA starts at the loaded weights.

        Raises:
            UserError: the file cannot be read, or does not match this model.
        """
        ignored = (*ignore_keys, *PREDICTION_MARKERS, *(() if self.load_ema else (EMA,)))
        module, prefix = (self.model, MODEL) if only_model else (self, "")
        if path in ("", "None", "none"):  # YAML reads None as text
            raise UserError(f"ckpt_path {path!r}: name a checkpoint, or write null for none")
        opened = open_checkpoint(path)
        found = weights_of(opened.content, path)
        compare_markers(found, self.parameterization, str(path), opened.metadata)
        weights = {
            key: self._fitted(key, value)
            for key, value in found.items()
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
        """Return `value`, fitted to the shape of the model's tensor `key` if the settings allow it."""
        own = self.state_dict().get(key) if key in self.finetune_keys or self.make_it_fit else None
        if own is None or own.shape == value.shape or own.ndim != value.ndim:
            return value
        if key not in self.finetune_keys:
            logger.info("%s: %s repeated to fill %s", key, tuple(value.shape), tuple(own.shape))
            return _repeated(value, own.shape)
        kept = min(self.keep_finetune_dims, value.shape[1], own.shape[1])
        logger.info("%s: the first %d input channels are loaded, the other %d start at 0", key, kept,
                    own.shape[1] - kept)  # fmt: skip
        fitted = torch.zeros(own.shape, dtype=value.dtype)
        fitted[:, :kept] = value[:, :kept]
        return fitted

    def restart_ema(self) -> None:
        """Restart the moving average, if there is one, at the current weights."""
        if self.use_ema:
            self.model_ema = LitEma(self.model, paths=self.model_ema.m_name2s_name)

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Return a context in which the model has its averaged weights, if there are any. `context` is logged."""
        if not self.use_ema:
            return nullcontext()
        if context:
            logger.info("%s: using averaged weights", context)
        return self.model_ema.applied_to(self.model)


def _repeated(value: Tensor, shape: torch.Size) -> Tensor:
    """Return `value` repeated along its first two dimensions to `shape`, with unchanged sums over the inputs."""
    for dimension in range(min(2, value.ndim)):
        old, new = value.shape[dimension], shape[dimension]
        index = torch.arange(new) % old
        value = value.index_select(dimension, index)
        if dimension == 1:
            uses = torch.bincount(index, minlength=old)[index]
            value = value / uses.view(1, -1, *(1,) * (value.ndim - 2))
    return value
