"""Precisions of a run: bfloat16 weights, and mixed precision whose gradients can be clipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch.optim import Optimizer


class Bfloat16Weights(HalfPrecision):
    """Lightning's `bf16-true`, of which only the weights become bfloat16.

    Lightning also casts batches, which costs a stored float16 latent three of its bits, and makes bfloat16 the default
    type during a step, in which timesteps and losses are computed. The network casts its inputs to the type of its
    weights itself, and the rest is float32.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_input(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class ClippedMixedPrecision(MixedPrecision):
    """Mixed precision that clips the gradients of fused optimizers too, which Lightning refuses.

    Such an optimizer divides by the loss scale inside its own step. In bfloat16 nothing is scaled, and clipping is as
    ever. In float16 the norm of the scaled gradients is compared with the scaled limit. Gradients that overflow have
    a norm that is not finite; they stay so, and the scaler leaves the step out.
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
        limit = clip_val * self.scaler.get_scale() if unscales_itself else clip_val
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            self.clip_grad_by_value(optimizer, limit)
        else:
            self.clip_grad_by_norm(optimizer, limit)
