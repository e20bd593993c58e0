"""Prior preservation: loss of a batch with training samples and samples of the prior.

B: batch. C, h, w: channels, height and width of a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.batch_mean import BatchMean
from ldm.shards.sample import IS_PRIOR, TEACHER_KEYS
from ldm.util import check_choice, check_number

TARGETS = ("data", "teacher")
Timesteps = Callable[[Tensor], Tensor]  # from timesteps (B,) to timesteps (B,)


def check_prior_settings(weight: float, target: str) -> None:
    """Raise `UserError` unless `weight` is finite and at least 0, and `target` is one of `TARGETS`."""
    check_number("prior_loss_weight", weight, least=0, whole=False)
    check_choice("prior_target", target, TARGETS)


@dataclass(frozen=True)
class StoredPredictions:
    """Predictions of a frozen model on samples of a batch. Rows of other samples are arbitrary."""

    t: Tensor  # (B,) timesteps
    noise: Tensor  # (B, C, h, w), float32
    prediction: Tensor  # (B, C, h, w), float32: the output at this t and noise

    @classmethod
    def of(cls, batch: Batch) -> StoredPredictions:
        """Return the predictions in a batch.

        Raises:
            UserError: it has none.
        """
        t, noise, prediction = (batch_entry(batch, key) for key in TEACHER_KEYS)
        return cls(t, noise.float(), prediction.float())


@dataclass(frozen=True)
class Prior(BatchMean):
    """Averaging of losses for a batch with prior samples.

    Without a teacher, prior samples have the usual target. With a teacher, the target is the frozen model's prediction
    at the stored timestep and noise. This is knowledge distillation (arXiv:1503.02531). For Gaussians of equal
    variance, the squared error of the means is proportional to the divergence of teacher and student.
    """

    mask: Tensor  # (B,) bool
    weight: float  # λ
    teacher: StoredPredictions | None = None
    timesteps: Timesteps | None = None  # of prior samples without a teacher, from the usual ones; None leaves those

    @classmethod
    def of(cls, batch: Batch, weight: float, target: str, timesteps: Timesteps | None = None) -> Prior | None:
        """Return the averaging for a batch with the entry `IS_PRIOR`, else None.

        Raises:
            UserError: `target` is `teacher`, but the batch has no predictions.
        """
        if IS_PRIOR not in batch:
            return None
        teacher = None
        if target == "teacher":
            teacher = StoredPredictions.of(batch)
        return cls(batch[IS_PRIOR], weight, teacher, timesteps)

    def timesteps_and_noise(self, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) and noise (B, C, h, w), with those of the prior and of the teacher in its rows."""
        if self.teacher is None:
            return t if self.timesteps is None else torch.where(self.mask, self.timesteps(t), t), noise
        return torch.where(self.mask, self.teacher.t, t), torch.where(self._rows(), self.teacher.noise, noise)

    def target(self, target: Tensor) -> Tensor:
        """Return the targets (B, C, h, w), with the teacher's predictions in the prior's rows."""
        return target if self.teacher is None else torch.where(self._rows(), self.teacher.prediction, target)

    def _rows(self) -> Tensor:
        return self.mask[:, None, None, None]  # B 1 1 1

    def training_mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (B,) over the training samples; 0 if there are none."""
        return _mean_where(~self.mask, values)

    def prior_mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (B,) over the prior samples; 0 if there are none."""
        return _mean_where(self.mask, values)

    def loss_mean(self, values: Tensor) -> Tensor:
        """Return training mean + λ · prior mean (DreamBooth, arXiv:2208.12242, eq. 2)."""
        return self.training_mean(values) + self.weight * self.prior_mean(values)

    def logged(self, error: Tensor, split: str) -> dict[str, Tensor]:
        """Return the mean error of the prior samples."""
        return {f"{split}/loss_prior": self.prior_mean(error)}


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    # not `values[mask]`, because its size is known only after a synchronisation
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
