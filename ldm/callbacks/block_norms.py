"""Callback that logs the gradient norm and the relative update of the weights by group of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.checkpoint.keys import UNET
from ldm.distributed.collectives import mean_over_processes
from ldm.distributed.dtensor import is_partitioned, local_tensor
from ldm.optim import InBackward
from ldm.util import check_number


class BlockNorms(Callback):
    """Callback that logs `gradient_norm/<group>` and `update_ratio/<group>` every `every_n_train_steps`.

    A group is a part of the UNet, such as `input_blocks`, or another trained module. The gradient norm is that before
    clipping. The update ratio is ‖Δw‖ / ‖w‖ of a step. About 1e-3 is usual for a training from scratch, and 1e-5 for a
    fine-tune. `InBackward` frees gradients before the step, so that there is no gradient norm.

    Args:
        values: number of weights per tensor, spread evenly over it, that the ratio is computed from.

    Raises:
        UserError: a number is below 1.
    """

    def __init__(self, every_n_train_steps: int = 100, values: int = 4096) -> None:
        check_number("every_n_train_steps", every_n_train_steps, least=1)
        check_number("values", values, least=1)
        self.every_n_train_steps, self.values = every_n_train_steps, values
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._step = 0  # the step that is measured
        self._before: dict[str, list[Tensor]] | None = None
        self._gradients: dict[str, Tensor] = {}  # squared norms

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = grouped(pl_module)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        if self._before is None and step % self.every_n_train_steps == 0:
            self._step = step
            self._before = {name: self._some(weights) for name, weights in self._groups.items()}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._before is None or isinstance(optimizer, InBackward):
            return
        found = {name: [p.grad for p in weights if p.grad is not None] for name, weights in self._groups.items()}
        self._gradients = {name: _squares(gradients) for name, gradients in found.items() if gradients}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before is None or trainer.global_step < self._step:
            return
        squares = {f"gradient_norm/{name}": square for name, square in self._gradients.items()}
        for name, before in self._before.items():
            after = self._some(self._groups[name])
            squares[f"update/{name}"] = _squares([new - old for new, old in zip(after, before, strict=True)])
            squares[f"weights/{name}"] = _squares(before)
        self._before, self._gradients = None, {}
        device = trainer.strategy.root_device
        total = mean_over_processes(torch.stack([square.to(device) for square in squares.values()]))
        total *= trainer.world_size if is_partitioned(pl_module) else 1
        norms = dict(zip(squares, total.sqrt().tolist(), strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(_with_ratios(norms, self._groups), step=trainer.global_step - 1)

    def _some(self, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        flat = [local_tensor(weight.detach()).flatten() for weight in weights]
        return [part[:: max(1, len(part) // self.values)].float().clone() for part in flat]


def grouped(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of `module` by group: the parts of the UNet, and the other modules as a whole."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name.removeprefix(UNET).split(".")[0], []).append(parameter)
    return groups


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all values of this process, a float32 scalar."""
    return torch.stack([local_tensor(tensor).float().square().sum() for tensor in tensors]).sum()


def _with_ratios(norms: Mapping[str, float], groups: Mapping[str, Any]) -> dict[str, float]:
    gradients = {key: norm for key, norm in norms.items() if key.startswith("gradient_norm/")}
    pairs = {name: (norms[f"update/{name}"], norms[f"weights/{name}"]) for name in groups}
    return gradients | {f"update_ratio/{name}": update / norm for name, (update, norm) in pairs.items() if norm > 0}
