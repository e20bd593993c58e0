"""Tests of resuming with main.py: exact continuation, and changed settings."""

import signal
import sys
import threading

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import PickledCheckpoint, encoder_digests, save_state_dict
from ldm.config.load import build_model
from ldm.release.hack import hack_training
from ldm.util import UserError
from tests.sent_signals import sending
from tests.training_runs import (  # noqa: F401
    CONFIG,
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
    write_index,
)


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (3, ""),  # within an epoch of six batches
        (6, ""),  # at the end of one
        (9, "data.params.num_workers=2"),
        (4, "--accumulate_grad_batches 4"),  # two steps an epoch, the second of two batches only
        (4, "data.params.val_urls=shards/s-000000.tar --val_check_interval 2"),
    ],
)
def test_a_run_resumed_with_more_steps_equals_an_uninterrupted_one(train, tmp_path, stop, options):
    train(f"-l straight --max_steps {stop + 4} {options}")
    train(f"-l resumed --max_steps {stop} {options}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps {stop + 4}")
    assert_same_training(the_run(tmp_path / "straight"), resumed)


@pytest.mark.parametrize(("limit", "stops"), [("--max_steps 21", (6, 8, 12, 13)), ("--max_epochs 4", (6, 12, 18))])
def test_a_run_may_stop_at_the_end_of_one_epoch_after_another(train, tmp_path, limit, stops):
    train(f"-l straight {limit}")
    train(f"-l resumed {limit} {sending(stops[0], signal.SIGINT)}")
    resumed = the_run(tmp_path / "resumed")
    for stop in (*stops[1:], 0):
        assert train(f"--resume {resumed} {sending(stop, signal.SIGINT)}") == 0
    assert_same_training(the_run(tmp_path / "straight"), resumed)


def test_checkpoints_written_in_the_background_resume_exactly(train, tmp_path, monkeypatch):
    """One is written while the next steps change the weights; the run continues from it after it has lost the last."""
    steps, place, write = [], PickledCheckpoint.placed_in, PickledCheckpoint.write

    def note_copy(self, memory):
        steps.append("copied")
        return place(self, memory)

    def write_late(self, path):
        if threading.current_thread() is not threading.main_thread():
            steps.append("written beside training")
        write(self, path)

    monkeypatch.setattr(PickledCheckpoint, "placed_in", note_copy)
    monkeypatch.setattr(PickledCheckpoint, "write", write_late)
    keep = "lightning.modelcheckpoint.params.every_n_train_steps=2 lightning.modelcheckpoint.params.save_last_k=3"
    train(f"-l straight --max_steps 7 {keep} lightning.modelcheckpoint.params.in_background=false")
    assert not steps
    train(f"-l resumed --max_steps 7 {keep}")
    assert sorted(steps) == ["copied"] * 3 + ["written beside training"] * 3
    resumed = the_run(tmp_path / "resumed") / "checkpoints"
    (resumed / "step=000000004.ckpt").replace(resumed / "last.ckpt")
    assert state(resumed / "last.ckpt")["global_step"] == 4
    train(f"--resume {resumed.parent} --max_steps 7")
    assert_same_training(the_run(tmp_path / "straight"), resumed.parent)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ("", 6),  # at the end of an epoch
        ("data.params.val_urls=shards/s-000000.tar --val_check_interval 4", 4),  # within it
        ("--accumulate_grad_batches 2 data.params.val_urls=shards/s-000000.tar --val_check_interval 3", 1),
    ],
    ids=["at an epoch's end", "within an epoch", "between the batches of a step"],
)
def test_a_run_that_ends_early_saves_its_last_step(train, tmp_path, options, step):
    """At `max_time`, by early stopping: the run ends between two checkpoints. It resumes exactly."""
    rare = f"lightning.modelcheckpoint.params.every_n_train_steps=1000 {options}"
    early = " ".join(
        f"lightning.callbacks.early.{setting}"
        for setting in (
            "target=pytorch_lightning.callbacks.EarlyStopping",
            f"params.monitor={'val' if 'val_urls' in options else 'train'}/loss_simple",
            "params.stopping_threshold=1e9",
        )
    )
    train(f"-l straight --max_steps 8 {rare}")
    train(f"-l resumed --max_steps 8 {rare} {early}")
    resumed = the_run(tmp_path / "resumed")
    assert state(resumed / "checkpoints" / "last.ckpt")["global_step"] == step
    train(f"--resume {resumed} --max_steps 8 lightning.callbacks.early=null")
    assert_same_training(the_run(tmp_path / "straight"), resumed)


def test_a_fresh_run_resumes_with_shards_of_another_encoder(train, tmp_path, caplog):
    write_index(tmp_path / "shards", autoencoder="0" * 64)
    assert train(f"--max_steps 4 {sending(2, signal.SIGINT)}") == 0
    run = the_run(tmp_path / "logs")
    caplog.clear()
    assert train(f"--resume {run} {sending(0, signal.SIGINT)}") == 0
    assert "the model, whose weights are random" in caplog.text
    assert train(f"--resume {run} --max_steps 5 {sending(0, signal.SIGINT)}") == 0  # the mark stays


def test_the_workflow_of_2022_hacks_a_stopped_run_and_resumes_it(train, tmp_path):
    """Start, stop with Ctrl-C, hack the release into last.ckpt, resume on shards of the release's autoencoder."""
    torch.manual_seed(5)
    release = build_model(OmegaConf.create(CONFIG)).state_dict()
    save_state_dict(release, tmp_path / "release.safetensors")
    write_index(tmp_path / "shards", autoencoder=encoder_digests(release)["autoencoder"])
    assert train(f"--max_steps 4 {sending(2, signal.SIGINT)}") == 0
    last = the_run(tmp_path / "logs") / "checkpoints" / "last.ckpt"
    hack_training(last, tmp_path / "release.safetensors", last)
    assert "is_loaded" not in state(last)["callbacks"]["SameEncoders"]
    assert train(f"--resume {the_run(tmp_path / 'logs')} {sending(0, signal.SIGINT)}") == 0
    write_index(tmp_path / "shards", autoencoder="0" * 64)
    with pytest.raises(UserError, match="autoencoder"):
        train(f"--resume {the_run(tmp_path / 'logs')} --max_steps 6 {sending(0, signal.SIGINT)}")


def test_a_run_without_steps_left_gives_a_warning(train, tmp_path, caplog):
    train("--max_steps 3")
    assert "No training" not in caplog.text
    assert train(f"--resume {the_run(tmp_path / 'logs')} --max_steps 2") == 0
    assert "already at step 3 (max_steps=2)" in caplog.text


def test_the_bar_of_a_run_resumed_within_an_epoch_is_full_at_its_end(train, tmp_path, capsys, monkeypatch):
    train("--max_steps 2")
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert train(f"--resume {the_run(tmp_path / 'logs')} --max_steps 4") == 0
    assert "| 4/4 [" in capsys.readouterr().out


def test_a_run_keeps_its_seed(train, tmp_path):
    train("-l straight --max_steps 4 -s 5")
    train("-l resumed --max_steps 2 -s 5")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    train("-l other --max_steps 4")
    assert logged(the_run(tmp_path / "other"), "train/loss") != logged(resumed, "train/loss")


@pytest.mark.parametrize("schedule", [False, True])
def test_a_resumed_run_uses_the_given_learning_rate(train, tmp_path, schedule):
    where = "model.params.scheduler_config"
    params = f"{where}.params.warm_up_steps=[1] {where}.params.cycle_lengths=[10000] {where}.params.f_start=[1.0]"
    params += f" {where}.params.f_max=[1.0] {where}.params.f_min=[1.0]"
    options = f"{where}.target=ldm.lr_scheduler.LambdaLinearScheduler {params}" if schedule else ""
    train(f"--max_steps 2 {options}")
    run = the_run(tmp_path / "logs")
    train(f"--resume {run} --max_steps 5 model.base_learning_rate=5e-4")
    rates = [float(rate) for rate in logged(run, "lr-AdamW").values()]
    assert rates == pytest.approx([2e-3] * 2 + [1e-3] * 3)


def test_a_resumed_run_keeps_scale_lr(train, tmp_path):
    train("--max_steps 1 --scale_lr False")
    run = the_run(tmp_path / "logs")
    train(f"--resume {run} --max_steps 2")
    train(f"--resume {run} --max_steps 3 --scale_lr")
    train(f"--resume {run} --max_steps 4")
    rates = [float(rate) for rate in logged(run, "lr-AdamW").values()]
    assert rates == pytest.approx([1e-3] * 2 + [2e-3] * 2)


def test_a_checkpoint_from_elsewhere_starts_a_new_run(train, tmp_path):
    train("-l first --max_steps 1")
    (the_run(tmp_path / "first") / "checkpoints" / "last.ckpt").rename(tmp_path / "hacked.ckpt")
    assert train("-b tiny.yaml --resume hacked.ckpt -l second --max_steps 2") == 0
    assert sorted(logged(the_run(tmp_path / "second"), "train/loss")) == [1]


def test_a_checkpoint_without_an_average_starts_it_from_the_weights(train, tmp_path):
    train("-l first --max_steps 1 model.params.use_ema=False")
    first = the_run(tmp_path / "first")
    weights = state(first / "checkpoints" / "last.ckpt")["state_dict"]
    train(f"--resume {first} model.params.use_ema=True --max_steps 2 model.base_learning_rate=1e-9")
    averaged = state(first / "checkpoints" / "last.ckpt")["state_dict"]
    for key in (key for key in weights if key.startswith("model.")):
        shadow = averaged["model_ema." + key.removeprefix("model.").replace(".", "")]
        torch.testing.assert_close(shadow, weights[key], rtol=0, atol=1e-5)


SCHEDULE = "model.params.scheduler_config"
DECAY = f"{SCHEDULE}.target=ldm.lr_scheduler.LambdaLinearScheduler " + " ".join(
    f"{SCHEDULE}.params.{setting}"
    for setting in ("warm_up_steps=[1]", "cycle_lengths=[3]", "f_start=[1.0]", "f_max=[1.0]", "f_min=[0.0]")
)
LOW_BIT = "model.params.optimizer_config.target=ldm.optim.low_bit.AdamW8bit"
IN_BACKWARD = (
    "model.params.optimizer_config.target=ldm.optim.InBackward "
    "model.params.optimizer_config.params.optimizer.target=torch.optim.AdamW"
)


@pytest.mark.parametrize("optimizer", ["", LOW_BIT, IN_BACKWARD])
def test_a_removed_schedule_leaves_no_rate(train, tmp_path, optimizer):
    train(f"--max_steps 4 {DECAY} {optimizer}")
    run = the_run(tmp_path / "logs")
    assert float(state(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]["lr"]) == 0
    train(f"--resume {run} --max_steps 6 {SCHEDULE}=null")
    group = state(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]
    assert float(group["lr"]) == pytest.approx(2e-3) and "initial_lr" not in group


def test_a_changed_schedule_is_used_from_the_first_step_on(train, tmp_path):
    train(f"--max_steps 2 {DECAY}")
    run = the_run(tmp_path / "logs")
    train(f"--resume {run} --max_steps 3 {SCHEDULE}.params.f_max=[0.5] {SCHEDULE}.params.f_min=[0.5]")
    key = next(key for key in ("lr-AdamW", "lr-AdamW/pg1") if logged(run, key))
    assert float(logged(run, key)[2]) == pytest.approx(1e-3)


def test_the_optimizers_own_rate_is_the_one_that_is_printed_and_used_on_resume(train, tmp_path, caplog):
    where = "model.params.optimizer_config"
    train(f"--max_steps 1 {where}.target=torch.optim.AdamW {where}.params.lr=3e-4")
    run = the_run(tmp_path / "logs")
    caplog.set_level("INFO")
    train(f"--resume {run} --max_steps 2 {where}.params.lr=5e-4")
    assert "Learning rate 5.000e-04 (the optimizer's own lr" in caplog.text
    assert state(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]["lr"] == 5e-4


@pytest.mark.parametrize(
    ("before", "now", "where"),
    [
        ("", "model.params.optimizer_config.target=torch.optim.AdamW", "model.params.optimizer_config"),
        (LOW_BIT, "", "model.params.optimizer_config"),
        (IN_BACKWARD, "", "model.params.optimizer_config.params.optimizer"),
    ],
)
def test_a_resumed_run_uses_the_optimizer_settings_of_its_config(train, tmp_path, caplog, before, now, where):
    train(f"--max_steps 1 {before}")
    run = the_run(tmp_path / "logs")
    caplog.set_level("INFO")
    train(f"--resume {run} --max_steps 2 {now} {where}.params.weight_decay=0.3 {where}.params.betas=[0.5,0.6]")
    group = state(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.3 and tuple(group["betas"]) == (0.5, 0.6)
    assert "The optimizer's weight_decay was 0.01 in the checkpoint; it is 0.3 now" in caplog.text


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("target=torch.optim.SGD", "the checkpoint's optimizer has no momentum, as SGD does; keep the optimizer"),
        ("params.amsgrad=True", "the checkpoint's optimizer has amsgrad=False, not True; keep the optimizer"),
    ],
)
def test_another_optimizer_cannot_take_up_the_state_of_the_old_one(train, tmp_path, setting, said):
    where = "model.params.optimizer_config"
    train(f"--max_steps 1 {where}.target=torch.optim.AdamW")
    with pytest.raises(UserError, match=said):
        train(f"--resume {the_run(tmp_path / 'logs')} --max_steps 2 {where}.{setting}")


def test_kept_checkpoints_stay_as_many_after_resumes(train, tmp_path):
    where = "lightning.modelcheckpoint.params"
    options = f"data.params.val_urls=shards/s-000000.tar --val_check_interval 2 {where}.filename={{step}}"
    train(f"--max_steps 8 {options} {where}.save_top_k=3 {where}.monitor=val/loss {where}.every_n_train_steps=1")
    run = the_run(tmp_path / "logs")
    kept = sorted((run / "checkpoints").glob("step=?.ckpt")) or sorted((run / "checkpoints").glob("*step*.ckpt"))
    assert len(kept) == 3
    moved = run.rename(run.with_name("moved"))  # the checkpoints name the old folder
    train(f"--resume {moved} --max_steps 12 {where}.save_top_k=2")
    assert len([path for path in (moved / "checkpoints").glob("*.ckpt") if path.name != "last.ckpt"]) == 2
