"""Averaging of losses over the samples of a batch.

B: batch. t (B,): timesteps, counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Mean of values (B,) over samples of the batch.
Mean = Callable[[Tensor], Tensor]


class BatchMean:
    """Averaging of losses with equal weight for all samples. Subclasses weight some samples differently."""

    def timesteps_and_noise(self, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the timesteps (B,) and the noise (B, …) of the model's input."""
        return t, noise

    def target(self, target: Tensor) -> Tensor:
        """Return the targets (B, …) of the predictions, given the usual ones."""
        return target

    def of_elements(self, error: Tensor) -> Tensor:
        """Return the mean error (B,) of each sample, from the errors (B, …) of its elements."""
        return error.flatten(1).mean(1)

    def training_mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (B,) over the training samples."""
        return values.mean()

    def loss_mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (B,) for the loss."""
        return values.mean()

    def logged(self, error: Tensor, split: str) -> dict[str, Tensor]:
        """Return further values to log, from the errors (B,)."""
        return {}


EQUAL = BatchMean()
