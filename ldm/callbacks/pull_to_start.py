"""Penalty on the distance of the weights from their start, per parameter tensor, in the loss."""

from __future__ import annotations

from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from ldm.callbacks.start_weights import Starts, read_starts, set_weight_decay, start_of
from ldm.checkpoint.formats import precise_dtype
from ldm.distributed.dtensor import is_partitioned, local_tensor
from ldm.optim import InBackward
from ldm.util import UserError, check_number, refuse_if


class PullToStart(Callback):
    """Callback that adds λ · Σ_k mean((θ_k − θ⁰_k)²) to the loss, over the parameter tensors k, with θ⁰ from a file.

    The mean gives each tensor the same weight, large or small (arXiv:2505.19519). The callback adds the gradient,
    2λ / n_k · (θ_k − θ⁰_k) for n_k elements, after the backward pass of each optimizer step. Gradient clipping and the
    optimizer's statistics thus see the sum, unlike with `DecayToStart`.

    θ⁰ is read from the file one parameter at a time, so that memory holds no second model. Each step reads the whole
    file. The penalty is logged as `train/loss_pull`, except with FSDP, and is not part of `train/loss`.

    Args:
        start: the released checkpoint, or the training checkpoint made from it.
        weight: λ.
        weight_decay: value to set the optimizer's own decay to, which pulls towards zero; null leaves it.
    """

    def __init__(self, start: str, weight: float, weight_decay: float | None = None) -> None:
        check_number("weight", weight, above=0, whole=False)
        check_number("weight_decay", weight_decay, least=0, whole=False, optional=True)
        self.start = Path(start)
        self.weight = weight
        self.weight_decay = weight_decay
        self._starts: Starts = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, and compare it with the trained parameters.

        Raises:
            UserError: the file cannot be read or does not hold the trained parameters, or gradients cannot be changed
                before the step.
        """
        refuse_if(
            any(isinstance(optimizer, InBackward) for optimizer in trainer.optimizers),
            "pull_to_start: adds to the gradients before a step, and ldm.optim.InBackward steps during backward; "
            "use decay_to_start.yaml, or the inner optimizer as optimizer_config",
        )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                f"pull_to_start: precision={trainer.precision} scales the gradients; use --precision bf16-mixed"
            )
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._starts = read_starts(self.start, groups, pl_module, "pull_to_start")
        for group in groups:
            set_weight_decay(group, self.weight_decay, "pull_to_start")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, before Lightning clips the gradients."""
        penalties: list[Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._starts and parameter.grad is not None:
                    penalties.append(self._pull(parameter))
        if penalties and not is_partitioned(pl_module):
            pl_module.log("train/loss_pull", self.weight * torch.stack(penalties).sum(), batch_size=1)

    def _pull(self, parameter: torch.nn.Parameter) -> Tensor:
        """Add the gradient of one tensor, and return its mean squared distance."""
        dtype = precise_dtype(parameter.dtype)
        moved = local_tensor(parameter).to(dtype) - start_of(self._starts, parameter, dtype)
        gradient = local_tensor(parameter.grad)
        gradient.add_((2 * self.weight / parameter.numel() * moved).to(gradient.dtype))
        return moved.square().sum() / parameter.numel()
