"""Decay towards the initial weights of training, which limits forgetting without data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ldm.callbacks.start_weights import Starts, read_starts, set_weight_decay, start_of
from ldm.checkpoint.formats import precise_dtype
from ldm.distributed.dtensor import local_tensor
from ldm.util import UserError, check_number


class DecayToStart(Callback):
    """Callback that applies θ ← θ − lr · λ · (θ − θ⁰) at the end of each optimizer step, with θ⁰ from a file.

    The update follows the gradient of L2-SP's penalty λ/2 · ‖θ − θ⁰‖² (arXiv:1802.01483, where λ is α), decoupled from
    the optimizer's statistics like AdamW's weight decay (arXiv:1711.05101, algorithm 2). Without other updates, it
    halves the distance of a weight from its start in ln 2 / (lr · λ) steps, so small learning rates need a large λ.

    θ⁰ is read from the file one parameter at a time, so that memory holds no second model. Each application reads the
    whole file; `every_n_steps` makes that less frequent. Training stops if the file is overwritten or truncated.

    The arithmetic is float32. Weights kept in bfloat16 are rounded stochastically, because the update is far smaller
    than their precision of 2⁻⁸. The moving average (EMA) and checkpoints see the weights after the update.

    An optimizer's own decay, 0.01 in AdamW by default, pulls towards zero at the same time.

    Args:
        start: the released checkpoint, or the training checkpoint made from it.
        weight: λ.
        every_n_steps: apply n · λ at each step that n divides.
        weight_decay: value to set the optimizer's own decay to; null leaves it.
    """

    def __init__(self, start: str, weight: float, every_n_steps: int = 1, weight_decay: float | None = None) -> None:
        check_number("weight", weight, above=0, whole=False)
        check_number("every_n_steps", every_n_steps, least=1)
        check_number("weight_decay", weight_decay, least=0, whole=False, optional=True)
        self.start = Path(start)
        self.weight = weight
        self.every_n_steps = every_n_steps
        self.weight_decay = weight_decay
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, compare it with the trained parameters, and register hooks on the optimizers.

        Raises:
            UserError: the file cannot be read or does not hold the trained parameters, or the decay is too strong.
        """
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        starts = read_starts(self.start, groups, pl_module, "decay_to_start")
        for group in groups:
            self._check_rate(group)
            set_weight_decay(group, self.weight_decay, "decay_to_start")

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (trainer.global_step + 1) % self.every_n_steps == 0:  # the count increases after the hook
                self._pull(optimizer, starts, seed=trainer.global_step)

        self._hooks = [optimizer.register_step_post_hook(hook) for optimizer in trainer.optimizers]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _check_rate(self, group: Mapping[str, Any]) -> None:
        rate = group.get("initial_lr", group["lr"])  # initial_lr: a schedule may begin at 0
        if self._share(rate) > 1:
            raise UserError(
                f"decay_to_start: learning rate {float(rate):.3g} * weight {self.weight} * every_n_steps "
                f"{self.every_n_steps} is {self._share(rate):.3g}, which overshoots the start; keep it below 1"
            )

    def _share(self, rate: float | Tensor) -> float:
        """Return the fraction of its distance that a weight moves back per pull, at the learning rate `rate`."""
        return float(rate) * self.weight * self.every_n_steps

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, starts: Starts, seed: int) -> None:
        generators: dict[torch.device, torch.Generator] = {}  # same numbers in all processes and after a resume
        for group in optimizer.param_groups:
            share = min(self._share(group["lr"]), 1.0)  # more would overshoot the start
            for parameter in group["params"]:
                if parameter in starts:
                    dtype = precise_dtype(parameter.dtype)
                    start = start_of(starts, parameter, dtype)
                    own = local_tensor(parameter)
                    pulled = torch.lerp(own.to(dtype), start, share)
                    if own.dtype == torch.bfloat16:
                        if own.device not in generators:
                            generators[own.device] = torch.Generator(own.device).manual_seed(seed)
                        pulled = _rounded_stochastically(pulled, generators[own.device])
                    own.copy_(pulled)


def _rounded_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 `value` to bfloat16's precision, away from zero with the probability that the dropped bits give."""
    noise = torch.randint(1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    return ((value.view(torch.int32) + noise) & ~0xFFFF).view(torch.float32)
