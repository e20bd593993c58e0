"""Detection of losses, gradients and weights that are not finite."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from ldm.checkpoint.formats import reducible
from ldm.distributed.dtensor import full_tensor, local_tensor
from ldm.util import UserError, check_number, refuse_if

log = logging.getLogger(__name__)

_MOST_NAMED = 8  # samples in a message


class NumericalFault(UserError):
    """Error for a loss, gradient or weight that is not finite, or a gradient that is far too large.

    The state of training must not be saved.
    """


@dataclass(frozen=True)
class _Noted:
    """Loss of a batch, with the data for a message. Tensors stay on the device, because reading them would wait."""

    step: int  # optimizer step of the batch, counted from 1
    keys: list[str]
    samples: tuple[Tensor, Tensor] | None  # timesteps (B,) and losses (B,)
    loss: Tensor

    def described(self) -> str:
        """Return the loss and the timesteps of the samples whose own losses are not finite, or else of all samples."""
        timesteps, losses = ([], []) if self.samples is None else (part.tolist() for part in self.samples)
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        named = []
        for number in bad or range(max(len(self.keys), len(timesteps))):
            sample = f"sample {self.keys[number]!r}" if number < len(self.keys) else f"sample number {number}"
            named.append(f"{sample} at timestep {timesteps[number]}" if timesteps else sample)
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        return f"loss {self.loss.item():.4g}, {', '.join(named[:_MOST_NAMED]) or 'samples without names'}{more}"


class NumericalFaults(Callback):
    """Callback that finds losses, gradients and weights that are not finite, and names step, samples and timesteps.

    With `stop`, losses are collected on the device and read every few batches, so that no step waits for them. With
    `skip`, the callback waits for the gradient norm before each optimizer step. A faulty step, with all its accumulated
    batches, then changes neither weights nor optimizer state. Step count, learning rate schedule and moving average
    continue. In both modes, a checkpoint is written only after losses, trained weights and optimizer state have been
    found finite. The last good checkpoint thus stays on the disk.

    An optimizer that steps inside the backward pass cannot skip a step; `ldm.training.compatibility` refuses it.

    In float16 mixed precision, overflowing gradients are not a fault, because the gradient scaler handles them.

    Args:
        on_fault: `stop` or `skip`.
        every_n_batches: batches between reads of the losses; with `skip`, every step reads them.
        grad_norm_factor: limit of the gradient norm before clipping, as a multiple of its median over the last `window`
            good steps. A larger norm is a fault. None sets no limit. With a limit, `stop` waits at each step.
        window: number of steps of the median. With fewer steps, the norm has no limit.
        most_skips: number of consecutive skipped steps that stops training.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        on_fault: str = "stop",
        every_n_batches: int = 10,
        grad_norm_factor: float | None = None,
        window: int = 100,
        most_skips: int = 10,
    ) -> None:
        refuse_if(on_fault not in ("stop", "skip"), f"on_fault {on_fault!r}: give stop or skip")
        counts = {"every_n_batches": every_n_batches, "window": window, "most_skips": most_skips}
        for name, count in counts.items():
            check_number(name, count, least=1)
        check_number("grad_norm_factor", grad_norm_factor, above=1, whole=False, optional=True)
        self.skips = on_fault == "skip"
        self.every_n_batches = every_n_batches
        self.grad_norm_factor = grad_norm_factor
        self.most_skips = most_skips
        self._norms: deque[float] = deque(maxlen=window)
        self._skipped = 0  # consecutive steps
        self._keys: list[str] = []
        self._noted: list[_Noted] = []  # batches since the last check; with `skip`, since the last step

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._norms.extend(state_dict["norms"])
        self._skipped = state_dict["skipped"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._keys = _sample_keys(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        samples = getattr(pl_module, "sample_losses", None)
        whole = loss.detach() * trainer.accumulate_grad_batches  # Lightning divided it
        self._noted.append(_Noted(trainer.global_step + 1, self._keys, samples, whole))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.skips and self.grad_norm_factor is None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        step, scaler = trainer.global_step + 1, getattr(trainer.precision_plugin, "scaler", None)
        batches = [entry for entry in self._noted if entry.step == step]  # earlier entries wait for the next check
        # A fused optimizer unscales gradients only within its step.
        are_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        norm = float(full_tensor(torch.nn.utils.get_total_norm(gradients)))
        norm /= scaler.get_scale() if are_scaled else 1.0
        fault = self._fault_of(norm, batches, scaler is not None)
        if _agreed(trainer, fault is not None):
            self._skip(f"step {step}: {fault or 'a fault in another process'}", optimizer, are_scaled)
        elif math.isfinite(norm):
            self._norms.append(norm)
            self._skipped = 0
        if self.skips:
            self._noted.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.skips and len(self._noted) >= self.every_n_batches:
            self._check_losses(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.skips:
            self._check_losses(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise `NumericalFault` before a state that is not finite replaces a good checkpoint."""
        if not self.skips:
            self._check_losses(trainer)
        trained = (local_tensor(parameter) for parameter in pl_module.parameters() if parameter.requires_grad)
        broken = not _all_finite(trained) or not _all_finite(_tensors(checkpoint.get("optimizer_states")))
        if _agreed(trainer, broken):
            raise NumericalFault(
                f"step {trainer.global_step}: trained weights or optimizer state are not finite and were not saved; "
                "resume the last checkpoint with a lower learning rate"
            )

    def _check_losses(self, trainer: Trainer) -> None:
        """Wait for the losses noted so far, and raise `NumericalFault` for the first that is not finite."""
        noted, self._noted = self._noted, []
        finite = torch.stack([entry.loss for entry in noted]).isfinite().tolist() if noted else []
        first = next((entry for entry, good in zip(noted, finite, strict=True) if not good), None)
        if _agreed(trainer, first is not None):
            what = f"step {first.step}: {first.described()}" if first else "a loss in another process is not finite"
            raise NumericalFault(f"{what}; the step was not saved; resume the last checkpoint with --resume")

    def _fault_of(self, norm: float, batches: list[_Noted], is_scaled: bool) -> str | None:
        """Return the fault of a step with these batches and this gradient norm, or None."""
        bad = next((entry for entry in batches if not math.isfinite(entry.loss)), None)
        if bad is not None:
            return bad.described()
        if not math.isfinite(norm):
            return None if is_scaled else f"gradient norm {norm}; {_describe(batches)}"
        if self.grad_norm_factor is None or len(self._norms) < (self._norms.maxlen or 0):
            return None
        usual = statistics.median(self._norms)
        if norm <= self.grad_norm_factor * usual:
            return None
        return f"gradient norm {norm:.4g}, {norm / usual:.4g} times the usual {usual:.4g}; {_describe(batches)}"

    def _skip(self, what: str, optimizer: Optimizer, are_scaled: bool) -> None:
        self._skipped += 1
        if not self.skips or self._skipped >= self.most_skips:
            after = f" ({self._skipped} consecutive steps skipped)" if self.skips else ""
            raise NumericalFault(f"{what}{after}; resume the last checkpoint with --resume")
        log.warning("\nSkipped %s", what)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if are_scaled and parameter.grad is not None:
                    parameter.grad.fill_(math.inf)  # the scaler then skips the step itself
                else:
                    parameter.grad = None  # optimizers skip it, with momentum and weight decay


def _describe(batches: list[_Noted]) -> str:
    return "; ".join(entry.described() for entry in batches)


def _sample_keys(batch: Any) -> list[str]:
    """Return the names (`__key__`) of the samples in a batch; an empty list if they have none."""
    keys = batch.get("__key__") if isinstance(batch, Mapping) else None
    return [str(key) for key in keys] if isinstance(keys, (list, tuple)) else []


def _agreed(trainer: Trainer, found: bool) -> bool:
    """Return True if any process found a fault."""
    return trainer.strategy.reduce_boolean_decision(found, all=False) if trainer.world_size > 1 else found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _all_finite(tensors: Iterator[Tensor]) -> bool:
    """Return True if all plain tensors are finite; quantised ones are ignored. Waits once per device."""
    found: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.numel():
            continue
        numbers = reducible(tensor.detach())
        if numbers is not None:
            # A sum of squares can overflow for finite values. Minimum and maximum are exact, and NaN propagates.
            extremes = torch.stack(torch.aminmax(numbers)).isfinite().all()
            found[tensor.device] = found[tensor.device] & extremes if tensor.device in found else extremes
    return all(map(bool, found.values()))
