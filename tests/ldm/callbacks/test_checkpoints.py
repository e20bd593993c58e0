"""When `last.ckpt` is due."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.callbacks.checkpoints import LastCheckpoint
from ldm.callbacks.signals import SignalRequests


def due_steps(every: int | None, steps_an_epoch: int, **limits: int) -> list[int]:
    """The steps of three epochs at which a checkpoint is written."""
    saved: list[int] = []
    trainer = SimpleNamespace(
        **{"max_steps": -1, "max_epochs": -1} | limits,
        world_size=1,
        fast_dev_run=False,
        fit_loop=SimpleNamespace(state_dict=dict),
        save_checkpoint=lambda *args, **kwargs: saved.append(trainer.global_step),
    )
    callback = LastCheckpoint(Path("last.ckpt"), SignalRequests(), every_n_train_steps=every)
    for step in range(1, 3 * steps_an_epoch + 1):
        trainer.global_step, trainer.current_epoch = step, (step - 1) // steps_an_epoch
        trainer.is_last_batch = step % steps_an_epoch == 0
        callback.on_train_batch_end(trainer, None, None, None, 0)
    return saved


@pytest.mark.parametrize(
    ("every", "limits", "expected"),
    [
        (None, {}, [4, 8, 12]),
        (5, {}, [5, 10]),
        (1000, {}, []),
        (1000, {"max_epochs": 3}, [12]),
        (5, {"max_steps": 7}, [5, 7, 10]),
    ],
    ids=["each epoch", "by steps alone", "short epochs write nothing", "the last epoch's end", "the last step"],
)
def test_last_checkpoint_is_due(every: int | None, limits: dict[str, int], expected: list[int]) -> None:
    assert due_steps(every, steps_an_epoch=4, **limits) == expected
