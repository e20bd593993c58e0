"""Tests through main.py of checkpoints that are copied beside the next step: of weights that stay on the host."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ldm.callbacks.background_writer import BackgroundWriter, Pair
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.training_runs import assert_equal, fixture_one_thread, fixture_train, state, the_run  # noqa: F401
from tests.waiting import LIMIT

MINIMAL = (
    "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel "
    "model.params.unet_config.params.stream_dtype=fp32"
)
SMALLEST = "-b tiny.yaml smallest.yaml model.params.optimizer_config.params.bucket_mb=0.001"  # steps within backward
KEEP = "lightning.modelcheckpoint.params.every_n_train_steps=1 lightning.modelcheckpoint.params.save_last_k=9"


def hold_copies(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let each copy in a thread begin when training waits for it, or has stepped without waiting.

    Return a list of the copies so far, with True for those that begin after the loss of the next step.
    """
    computed, arrived, beside = threading.Event(), threading.Event(), []
    copy, start, wait = BackgroundWriter._copy, BackgroundWriter.start, BackgroundWriter.wait_for_copy
    loss, end, finish = LatentDiffusion.training_step, LatentDiffusion.on_train_batch_end, BackgroundWriter.finish

    def note_start(self: BackgroundWriter, *args) -> None:
        computed.clear()
        arrived.clear()
        start(self, *args)

    def note_loss(self: LatentDiffusion, *args, **kwargs) -> torch.Tensor:
        result = loss(self, *args, **kwargs)
        computed.set()
        return result

    def note_wait(self: BackgroundWriter) -> None:
        arrived.set()
        wait(self)

    def note_finish(self: BackgroundWriter) -> None:
        if self.is_busy:
            arrived.set()
        finish(self)

    def note_step(self: LatentDiffusion, *args, **kwargs) -> None:
        if computed.is_set():  # since the start
            arrived.set()
        end(self, *args, **kwargs)

    def copy_late(self: BackgroundWriter, later: Sequence[Pair], versions: Sequence[int]) -> None:
        assert threading.current_thread() is not threading.main_thread() and later
        assert arrived.wait(LIMIT)
        beside.append(computed.is_set())
        copy(self, later, versions)

    for owner, name, replacement in (
        (BackgroundWriter, "start", note_start),
        (BackgroundWriter, "wait_for_copy", note_wait),
        (BackgroundWriter, "finish", note_finish),
        (LatentDiffusion, "training_step", note_loss),
        (LatentDiffusion, "on_train_batch_end", note_step),
        (BackgroundWriter, "_copy", copy_late),
    ):
        monkeypatch.setattr(owner, name, replacement)
    return beside


@pytest.mark.parametrize(
    "options",
    [
        MINIMAL,
        f"{MINIMAL} --accumulate_grad_batches 2 --gradient_clip_val 0.5",
        f"{MINIMAL} data.params.val_urls=shards/s-000000.tar --val_check_interval 1",
        SMALLEST,
        f"{SMALLEST} --accumulate_grad_batches 2",
    ],
    ids=["minimal", "minimal, accumulated and clipped", "minimal, validated", "smallest", "smallest, accumulated"],
)
def test_a_copy_made_beside_the_next_step_is_of_its_own_step(train, tmp_path: Path, monkeypatch, options: str) -> None:
    """Each file equals that of a run that waits for it, although the next loss is computed before the copy."""
    monkeypatch.setattr("ldm.callbacks.background_writer._LARGE", 1)  # also the smallest tensors are copied late
    train(f"-l straight --max_steps 5 {KEEP} lightning.modelcheckpoint.params.in_background=false {options}")
    beside = hold_copies(monkeypatch)
    train(f"-l beside --max_steps 5 {KEEP} {options}")
    assert len(beside) == 4, "training waits for the last"
    assert any(beside) != ("val_urls" in options), "validation comes first, and waits"
    for step in range(1, 6):
        name = f"checkpoints/step={step:09}.ckpt"
        one, other = (state(the_run(tmp_path / logs) / name) for logs in ("straight", "beside"))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"):
            assert_equal(one[part], other[part])
    assert one["global_step"] == 5
