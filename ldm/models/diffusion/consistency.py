"""Direct consistency: a loss that compares the error of each training sample with the frozen base model's.

B: batch. C, h, w: channels, height and width of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ldm.models.diffusion.batch import Batch
from ldm.models.diffusion.batch_mean import EQUAL, BatchMean
from ldm.models.diffusion.loss import Unweighted, Weighted
from ldm.models.diffusion.preservation import Prior, StoredPredictions
from ldm.shards.sample import TEACHER_KEYS
from ldm.util import check_number, refuse_if


class DirectConsistency(Unweighted):
    """Loss −log σ(−β (‖y − y_θ‖² − ‖y − y₀‖²)) of a training sample (direct consistency, arXiv:2402.12004).

    y is the target, y_θ the model's output and y₀ the base model's. Both errors are means over the elements. The
    gradient vanishes for a sample whose error is far below the base's, so that no sample is learnt more than needed.
    The base's outputs are those that `tools/make_prior.py --shards … --teacher K` stores with the training set, so that
    memory holds no second model. Prior samples keep their loss.

    Args:
        beta: β. Small values learn more: a sample with β · (error − base's error) = −5 is as good as learnt.
    """

    reads_predictions = True

    def __init__(self, beta: float = 1000.0) -> None:
        check_number("beta", beta, above=0, whole=False)
        self.beta = beta

    def attach(self, model: Weighted) -> None:
        refuse_if(
            model.loss_type != "l2",
            f"loss_type {model.loss_type}: DirectConsistency compares squared errors; leave it out",
        )
        refuse_if(
            not hasattr(model, "get_first_stage_encoding"),
            f"loss_config: DirectConsistency needs stored latents, and {type(model).__name__} has none; "
            "choose another loss",
        )

    def samples(self, batch: Batch, samples: BatchMean, training: bool = True) -> BatchMean:
        """Return the averaging for a batch of the training, and `samples` for validation.

        Raises:
            UserError: a batch of the training has no stored predictions.
        """
        if not training:
            return samples
        refuse_if(
            not set(TEACHER_KEYS) <= set(batch),
            "loss_config: DirectConsistency needs training samples with the base's predictions; make the set with "
            "tools/make_prior.py --shards TRAINING --teacher K, and name it in data.params.training_urls",
        )
        return Consistency(StoredPredictions.of(batch), self.beta, samples)


class Consistency(BatchMean):
    """Averaging of the losses of `DirectConsistency`, which then averages as `inner` does.

    Training samples take the timestep and the noise of their stored prediction.
    """

    def __init__(self, stored: StoredPredictions, beta: float, inner: BatchMean = EQUAL) -> None:
        self.stored, self.beta, self.inner = stored, beta, inner
        of_prior = inner.mask if isinstance(inner, Prior) else torch.zeros_like(stored.t, dtype=torch.bool)
        self.of_prior: Tensor = of_prior  # (B,)
        self.base_error: Tensor | None = None  # (B,), known with the target

    def timesteps_and_noise(self, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.of_prior[:, None, None, None]  # B 1 1 1
        t, noise = torch.where(self.of_prior, t, self.stored.t), torch.where(rows, noise, self.stored.noise)
        return self.inner.timesteps_and_noise(t, noise)

    def target(self, target: Tensor) -> Tensor:
        self.base_error = (target - self.stored.prediction).square().flatten(1).mean(1)
        return self.inner.target(target)

    def training_mean(self, values: Tensor) -> Tensor:
        return self.inner.training_mean(values)

    def loss_mean(self, values: Tensor) -> Tensor:
        """Return the mean over `inner` of the losses, from the errors `values` (B,)."""
        assert self.base_error is not None
        losses = -logsigmoid(-self.beta * (values - self.base_error))
        return self.inner.loss_mean(torch.where(self.of_prior, values, losses))

    def logged(self, error: Tensor, split: str) -> dict[str, Tensor]:
        """Return the values of `inner`, and the mean share of the gradient that is left, σ(β (error − base's))."""
        assert self.base_error is not None
        left = torch.sigmoid(self.beta * (error - self.base_error))
        return {**self.inner.logged(error, split), f"{split}/consistency": self.inner.training_mean(left)}
