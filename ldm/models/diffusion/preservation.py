"""Prior preservation: the loss of a batch, some of whose samples are there to be remembered.

B batch; C, h, w channels, height and width of a latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.loss import BatchMean
from ldm.shards.sample import IS_PRIOR, TEACHER_KEYS
from ldm.util import UserError

TARGETS = ("data", "teacher")


def check_prior_settings(weight: float, target: str) -> None:
    """Raise `UserError` unless `weight` is finite and at least 0, and `target` one of `TARGETS`."""
    if not 0 <= weight < math.inf:
        raise UserError(f"prior_loss_weight {weight!r}: give a number of at least 0")
    if target not in TARGETS:
        raise UserError(f"prior_target {target!r} is unknown; valid: {', '.join(TARGETS)}")


@dataclass(frozen=True)
class Teacher:
    """The predictions of a frozen model on the prior samples of a batch; other rows are arbitrary."""

    t: Tensor  # (B,) timesteps
    noise: Tensor  # (B, C, h, w), float32
    prediction: Tensor  # (B, C, h, w), float32: the model's output at that t and noise


@dataclass(frozen=True)
class Prior(BatchMean):
    """The prior samples of a batch, whose losses join those of the training samples.

    Without a teacher their target is that of any sample, from the data. With one it is the frozen model's prediction at
    the stored timestep and noise: knowledge distillation (arXiv:1503.02531) with squared (or absolute) errors, which
    for the means of Gaussians of one variance is the divergence between teacher and student up to a factor.
    """

    mask: Tensor  # (B,) bool
    weight: float  # λ
    teacher: Teacher | None = None

    @classmethod
    def of(cls, batch: Batch, weight: float, target: str) -> Prior | None:
        """Return the prior of a batch that has the entry `IS_PRIOR`, else None.

        Raises:
            UserError: `target` is `teacher`, and the batch holds no predictions.
        """
        if IS_PRIOR not in batch:
            return None
        teacher = None
        if target == "teacher":
            t, noise, prediction = (batch_entry(batch, key) for key in TEACHER_KEYS)
            teacher = Teacher(t, noise.float(), prediction.float())
        return cls(batch[IS_PRIOR], weight, teacher)

    def asked(self, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) and noise (B, C, h, w): in the prior's rows, those of the teacher's predictions."""
        if self.teacher is None:
            return t, noise
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

    def joined(self, values: Tensor) -> Tensor:
        """Return training mean + λ · prior mean (DreamBooth, arXiv:2208.12242, eq. 2)."""
        return self.training_mean(values) + self.weight * self.prior_mean(values)

    def logged(self, error: Tensor, split: str) -> dict[str, Tensor]:
        """Return the mean error of the prior samples."""
        return {f"{split}/loss_prior": self.prior_mean(error)}


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    # not `values[mask]`, whose size a GPU would have to be waited for
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
