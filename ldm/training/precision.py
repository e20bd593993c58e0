"""Precision plugins: bfloat16 weights, and mixed precision with gradient clipping for fused optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch.optim import Optimizer


class Bfloat16Weights(HalfPrecision):
    """Precision `bf16-true` that casts the weights alone to bfloat16.

    Lightning also casts batches, which takes three bits from a stored float16 latent, and makes bfloat16 the default
    dtype during a step, which would apply to timesteps and losses. Here the network casts its inputs to the dtype of
    its weights, and everything else is float32.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_input(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class ClippedMixedPrecision(MixedPrecision):
    """Mixed precision that also clips the gradients of fused optimizers, which Lightning refuses.

    A fused optimizer divides by the loss scale inside its own step. In bfloat16, gradients are not scaled, so they are
    clipped as usual. In float16, the norm of the scaled gradients is compared with the scaled limit. Overflowed
    gradients have a norm that is not finite. Clipping keeps them so, and the scaler skips the step. Clipping by value
    would make them finite, so the scaler unscales the gradients before, and records the overflow.
    """

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val <= 0:
            return
        unscales_itself = self.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            if unscales_itself:
                self.scaler.unscale_(optimizer)
            self.clip_grad_by_value(optimizer, clip_val)
        else:
            limit = clip_val * self.scaler.get_scale() if unscales_itself else clip_val
            self.clip_grad_by_norm(optimizer, limit)
