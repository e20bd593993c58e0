"""Callback that sends a signal to its own run at a chosen step."""

import os

from pytorch_lightning import Callback


class SendSignal(Callback):
    """Callback that sends this process a signal before training (step -1), in a training step or a validation batch."""

    def __init__(self, step: int, signum: int, validation: bool = False, times: int = 1) -> None:
        self.step, self.signum, self.validation, self.times = step, signum, validation, times

    def on_sanity_check_start(self, trainer, pl_module) -> None:
        if self.step == -1:
            os.kill(os.getpid(), self.signum)

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        if not self.validation and trainer.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.validation and trainer.global_step == self.step and batch_idx == 1:
            os.kill(os.getpid(), self.signum)


def sending(step, signum, validation=False):
    """Return the overrides that send `signum` in step `step`."""
    where = "lightning.callbacks.send"
    params = f"{where}.params.step={step} {where}.params.signum={int(signum)} {where}.params.validation={validation}"
    return f"{where}.target=tests.sent_signals.SendSignal {params}"
