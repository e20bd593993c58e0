"""Loss under a mask: the errors of the white part of an image count more than those outside.

B: batch. h, w: height and width of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.batch_mean import BatchMean
from ldm.models.diffusion.loss import Wrapper
from ldm.shards.sample import LOSS_MASK
from ldm.util import check_number

_LEAST = 1e-6  # avoids 0 / 0 for an empty mask


class Masked(Wrapper):
    """Mean over the elements of w · error, with w = m + `outside` · (1 − m) for the mask m in [0, 1].

    The batch entry `LOSS_MASK` is m, (B, 1, h, w).

    Args:
        outside: weight outside of the mask.
        by_area: divide each sample's error by its mean of w, so that samples count alike for any area of their masks.
        weighting: `target` and `params` of the weighting of the errors.

    Raises:
        UserError: `outside` is not from 0 to 1.
    """

    def __init__(self, outside: float = 0.1, by_area: bool = False, weighting: Mapping[str, Any] | None = None) -> None:
        check_number("outside", outside, least=0, most=1, whole=False)
        super().__init__(weighting)
        self.outside, self.by_area = outside, by_area

    @property
    def entries(self) -> tuple[str, ...]:
        return (*super().entries, LOSS_MASK)

    def samples(self, batch: Batch, samples: BatchMean, training: bool = True) -> BatchMean:
        mask = batch_entry(batch, LOSS_MASK).float()
        weights = mask + self.outside * (1 - mask)
        return MaskedMean(super().samples(batch, samples, training), weights, self.by_area)


class MaskedMean(BatchMean):
    """Averaging of `samples`, with the elements of a sample weighted by `weights` (B, 1, h, w)."""

    def __init__(self, samples: BatchMean, weights: Tensor, by_area: bool) -> None:
        self.inner, self.weights, self.by_area = samples, weights, by_area

    def of_elements(self, error: Tensor) -> Tensor:
        means = self.inner.of_elements(self.weights * error)
        return means / self.weights.flatten(1).mean(1).clamp(min=_LEAST) if self.by_area else means

    def timesteps_and_noise(self, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.timesteps_and_noise(t, noise)

    def target(self, target: Tensor) -> Tensor:
        return self.inner.target(target)

    def training_mean(self, values: Tensor) -> Tensor:
        return self.inner.training_mean(values)

    def loss_mean(self, values: Tensor) -> Tensor:
        return self.inner.loss_mean(values)

    def logged(self, error: Tensor, split: str) -> dict[str, Tensor]:
        return self.inner.logged(error, split)
