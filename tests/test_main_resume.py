"""main.py: a run that goes on, as if it had not stopped, or with what it is given."""

import signal
import sys

import pytest
import torch

from tests.sent_signals import sending
from tests.training_runs import (  # noqa: F401
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
def test_a_run_that_reached_its_steps_goes_on_as_if_it_had_not_stopped(train, tmp_path, stop, options):
    train(f"-l straight --max_steps {stop + 4} {options}")
    train(f"-l resumed --max_steps {stop} {options}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps {stop + 4}")
    assert_same_training(the_run(tmp_path / "straight"), resumed)


@pytest.mark.parametrize("limit", ["--max_steps 21", "--max_epochs 4"])
@pytest.mark.parametrize("stops", [(6, 12, 18), (6, 8, 12, 13)])
def test_a_run_may_stop_at_the_end_of_one_epoch_after_another(train, tmp_path, limit, stops):
    train(f"-l straight {limit}")
    train(f"-l resumed {limit} {sending(stops[0], signal.SIGINT)}")
    resumed = the_run(tmp_path / "resumed")
    for stop in (*stops[1:], 0):
        assert train(f"--resume {resumed} {sending(stop, signal.SIGINT)}") == 0
    assert_same_training(the_run(tmp_path / "straight"), resumed)


def test_a_run_that_has_its_steps_says_so(train, tmp_path, caplog):
    train("--max_steps 3")
    assert "Nothing was trained" not in caplog.text
    assert train(f"--resume {the_run(tmp_path / 'logs')} --max_steps 2") == 0
    assert "already at step 3 (max_steps=2)" in caplog.text


def test_the_bar_of_a_run_that_goes_on_within_an_epoch_is_full_at_its_end(train, tmp_path, capsys, monkeypatch):
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
def test_a_resumed_run_takes_the_learning_rate_that_it_is_given(train, tmp_path, schedule):
    where = "model.params.scheduler_config"
    params = f"{where}.params.warm_up_steps=[1] {where}.params.cycle_lengths=[10000] {where}.params.f_start=[1.0]"
    params += f" {where}.params.f_max=[1.0] {where}.params.f_min=[1.0]"
    options = f"{where}.target=ldm.lr_scheduler.LambdaLinearScheduler {params}" if schedule else ""
    train(f"--max_steps 2 {options}")
    run = the_run(tmp_path / "logs")
    train(f"--resume {run} --max_steps 5 model.base_learning_rate=5e-4")
    rates = [float(rate) for rate in logged(run, "lr-AdamW").values()]
    assert rates == pytest.approx([2e-3] * 2 + [1e-3] * 3)


def test_a_run_remembers_whether_its_learning_rate_is_scaled(train, tmp_path):
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


DECAYING = (
    "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaLinearScheduler"
    " model.params.scheduler_config.params.warm_up_steps=[{}] model.params.scheduler_config.params.cycle_lengths=[8]"
    " model.params.scheduler_config.params.f_start=[0.1] model.params.scheduler_config.params.f_max=[1.0]"
    " model.params.scheduler_config.params.f_min=[0.0]"
)
TIERS = ["", "-b tiny.yaml lean.yaml", "-b tiny.yaml minimal.yaml"]


def rates_of(checkpoint) -> list[float]:
    (optimizer,) = checkpoint["optimizer_states"]
    return [float(group["lr"]) for group in optimizer["param_groups"]]


@pytest.mark.parametrize("tier", TIERS)
def test_a_schedule_that_the_config_drops_leaves_no_rate_behind(train, tmp_path, caplog, tier):
    caplog.set_level("INFO")
    train(f"{tier} --max_steps 4 --scale_lr False {DECAYING.format(1)}")
    run = the_run(tmp_path / "logs")
    assert rates_of(state(run / "checkpoints/last.ckpt"))[0] < 6e-4
    train(f"--resume {run} --max_steps 6 model.params.scheduler_config=null")
    assert rates_of(state(run / "checkpoints/last.ckpt")) == pytest.approx([1e-3])
    assert "schedule of the checkpoint is dropped" in caplog.text and "and is 1.000e-03 from here on" in caplog.text


def test_a_schedule_that_the_config_changes_applies_at_once(train, tmp_path):
    train(f"-l straight --max_steps 6 --scale_lr False {DECAYING.format(3)}")
    train(f"-l resumed --max_steps 4 --scale_lr False {DECAYING.format(1)}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 6 {DECAYING.format(3)}")
    expected = logged(the_run(tmp_path / "straight"), "lr-AdamW")
    assert {step: logged(resumed, "lr-AdamW")[step] for step in (4, 5)} == {step: expected[step] for step in (4, 5)}


def test_a_schedule_that_the_config_adds_begins_at_its_start(train, tmp_path, caplog):
    caplog.set_level("INFO")
    train("--max_steps 3 --scale_lr False")
    run = the_run(tmp_path / "logs")
    train(f"--resume {run} --max_steps 5 {DECAYING.format(1)}")
    rates = {step: float(rate) for step, rate in logged(run, "lr-AdamW").items()}
    assert rates == pytest.approx({0: 1e-3, 1: 1e-3, 2: 1e-3, 3: 1e-4, 4: 7 / 8 * 1e-3})
    assert "schedule begins at its start" in caplog.text


def test_the_rate_that_an_optimizer_config_names_is_the_one_that_is_printed(train, tmp_path, caplog):
    caplog.set_level("INFO")
    optimizer = "model.params.optimizer_config.target=torch.optim.SGD model.params.optimizer_config.params.lr=0.25"
    train(f"--max_steps 1 {optimizer}")
    assert rates_of(state(the_run(tmp_path / "logs") / "checkpoints/last.ckpt")) == [0.25]
    assert "Learning rate 2.500e-01 (optimizer_config.params.lr takes precedence" in caplog.text


def test_a_fresh_run_on_a_pre_encoded_set_can_be_resumed(train, tmp_path, caplog):
    """The workflow of 2022: train, stop with Ctrl-C, put the weights in, resume; the resume may come first."""
    write_index(tmp_path / "shards", autoencoder="a" * 64, text_tower="b" * 64)
    assert train(f"{sending(1, signal.SIGINT)}") == 0
    run = the_run(tmp_path / "logs")
    assert "another autoencoder" in caplog.text
    assert train(f"--resume {run} --max_steps 3 --trust-config") == 0
    assert state(run / "checkpoints/last.ckpt")["global_step"] == 3
    assert train(f"--resume {run} --max_steps 4 --trust-config") == 0, "and again"
