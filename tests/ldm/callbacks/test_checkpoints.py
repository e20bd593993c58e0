"""When `last.ckpt` is due."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks.checkpoints import KeptCheckpoints, LastCheckpoint
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


@pytest.mark.parametrize("key", ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"])
def test_a_checkpoint_cannot_have_other_files_deleted(tmp_path: Path, key: str) -> None:
    """What it says was kept may be removed when something better comes, but only in the folder of checkpoints."""
    state = {"dirpath": str(tmp_path), "best_model_score": None, "best_model_path": "", "best_k_models": {}}
    own, other = str(tmp_path / "a.ckpt"), str(tmp_path.parent / "a.ckpt")
    for path, taken in ((own, True), (other, False), (str(tmp_path / "x.py"), False)):
        kept = KeptCheckpoints(dirpath=str(tmp_path), monitor="val/loss", save_top_k=2)
        kept.load_state_dict(state | {key: {path: torch.tensor(1.0)} if key == "best_k_models" else path})
        assert (getattr(kept, key) in (path, {path: torch.tensor(1.0)})) == taken
