"""main.py: training, stopping, going on; the run folder and its logs."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import Callback
from pytorch_lightning.loggers.logger import DummyLogger

import main
from ldm.training.config import load_config
from ldm.util import get_obj_from_str
from tests.training_runs import fixture_one_thread, fixture_train, logged, run_main, the_run, write_inputs  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


class SendSignal(Callback):
    """Sends this process a signal before training (step -1), during a training step, or during a validation batch."""

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


class FakeWandbLogger(DummyLogger):
    """Notes what it was made with."""

    made = None

    def __init__(self, name, save_dir, project) -> None:
        super().__init__()
        type(self).made = {"name": name, "save_dir": save_dir, "project": project}


def sending(step, signum, validation=False):
    """The overrides that send `signum` in step `step`."""
    where = "lightning.callbacks.send"
    params = f"{where}.params.step={step} {where}.params.signum={int(signum)} {where}.params.validation={validation}"
    return f"{where}.target=tests.test_main.SendSignal {params}"


def state(path):
    return torch.load(path, weights_only=True)


def assert_same_training(straight, resumed):
    """Equal losses at each step, and equal weights, averages, optimizer state and counts at the end, bit for bit."""
    losses = logged(straight, "train/loss")
    assert losses and losses == logged(resumed, "train/loss")
    one, other = (state(run / "checkpoints" / "last.ckpt") for run in (straight, resumed))
    assert one["global_step"] == other["global_step"]
    loops, others = (checkpoint["loops"]["fit_loop"] for checkpoint in (one, other))
    for counts in ("epoch_progress", "epoch_loop.batch_progress", "state_dict"):  # the last: where the data are
        assert loops[counts] == others[counts]
    assert [key for key, value in one["state_dict"].items() if not value.equal(other["state_dict"][key])] == []
    moments, same = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other))
    assert_equal(moments, same)


def assert_equal(one, other):
    """Tensors are equal in every bit, and the dicts that hold them in their keys."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    else:
        assert one.equal(other) if isinstance(one, torch.Tensor) else one == other


def test_a_run_folder_holds_checkpoints_configs_logs_and_pictures(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pictures = "lightning.callbacks.image_logger.params.disabled=False lightning.callbacks.image_logger.params"
    validation = "data.params.val_urls=shards/s-000000.tar"
    assert train(f"-n first -f x --max_steps 3 {pictures}.batch_frequency=4 {validation} --val_check_interval 2") == 0
    run = the_run(tmp_path / "logs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_first_x", run.name)
    kept = [path.name for path in (run / "checkpoints").iterdir()]
    assert "last.ckpt" in kept and len(kept) == 2
    steps = {path.name.split("_gs-")[1][:6] for path in (run / "images" / "train").glob("*.png")}
    assert steps == {"000001", "000002"}
    assert {path.name.split("_gs-")[0] for path in (run / "images" / "val").glob("*.png")} >= {"inputs", "samples"}
    assert list((run / "tensorboard").glob("events*")) and sorted(logged(run, "train/loss")) == [0, 1, 2]
    assert set(logged(run, "lr-AdamW").values()) == {"0.002"}
    assert "2.000e-03 = 1 (accumulated batches) * 1 (devices) * 2 (batch size) * 1.000e-03" in caplog.text

    project, lightning = (next((run / "configs").glob(f"*-{name}.yaml")) for name in ("project", "lightning"))
    assert OmegaConf.load(project).data.params.val_urls == "shards/s-000000.tar"
    assert OmegaConf.load(lightning).lightning.trainer.max_steps == 3
    assert set(load_config([lightning, project])) == {"model", "data", "lightning"}


def test_the_best_are_ranked_by_the_validation_of_their_own_step(train, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "ldm.training.resume.save_checkpoint",
        lambda content, path: saved.append((content["global_step"], Path(path).name)),
    )
    options = "lightning.modelcheckpoint.params.every_n_train_steps=1 data.params.val_urls=shards/s-000000.tar"
    assert train(f"--max_steps 5 --val_check_interval 2 {options}") == 0
    assert [step for step, name in saved if name != "last.ckpt"] == [2, 4]
    assert [step for step, name in saved if name == "last.ckpt"] == [1, 2, 3, 4, 5]


def test_without_a_monitor_every_so_many_steps_are_kept(train, tmp_path):
    params = "lightning.modelcheckpoint.params"
    assert train(f"--max_steps 4 {params}.every_n_train_steps=2 {params}.monitor=null {params}.save_top_k=-1") == 0
    kept = {path.name for path in (the_run(tmp_path / "logs") / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "epoch=000000-step=000000002.ckpt", "epoch=000000-step=000000004.ckpt"}


def test_checkpoints_hold_plain_data_that_a_strict_reader_takes(train, tmp_path):
    train("--max_steps 1")
    checkpoint = state(the_run(tmp_path / "logs") / "checkpoints" / "last.ckpt")
    assert checkpoint["callbacks"]["StepSeeds"] == {"seed": 23}
    assert any(key.startswith("model_ema.") for key in checkpoint["state_dict"])


def test_pictures_validation_and_workers_do_not_change_the_losses(train, tmp_path):
    train("-l plain --max_steps 8")
    pictures = "lightning.callbacks.image_logger.params.disabled=False"
    train(f"-l busy --max_steps 8 {pictures} data.params.val_urls=shards/s-000000.tar data.params.num_workers=2")
    assert_same_training(the_run(tmp_path / "plain"), the_run(tmp_path / "busy"))


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


@pytest.mark.parametrize(
    ("signum", "code", "options"),
    [
        (signal.SIGINT, 0, ""),
        (signal.SIGTERM, 143, ""),
        (signal.SIGINT, 0, "--accumulate_grad_batches 2"),
    ],
)
def test_a_signal_that_stops_loses_nothing(train, tmp_path, caplog, signum, code, options):
    caplog.set_level(logging.INFO)
    train(f"-l straight --max_steps 6 {options}")
    assert train(f"-l resumed --max_steps 6 {options} {sending(2, signum)}") == code
    resumed = the_run(tmp_path / "resumed")
    go_on = next(line for line in caplog.messages if "go on with" in line)  # the class that sends it needs trust there
    assert go_on.endswith(f"python main.py --resume {resumed.relative_to(tmp_path)} -t --trust-config")
    assert state(resumed / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert train(f"--resume {resumed} {sending(0, signum)}") == 0
    assert_same_training(the_run(tmp_path / "straight"), resumed)


def test_ctrl_c_during_validation_loses_nothing(train, tmp_path):
    options = "--max_steps 6 data.params.val_urls=shards/s-{000000..000001}.tar --val_check_interval 2"
    train(f"-l straight {options}")
    assert train(f"-l resumed {options} {sending(4, signal.SIGINT, validation=True)}") == 0
    resumed = the_run(tmp_path / "resumed")
    assert state(resumed / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert train(f"--resume {resumed} {sending(0, signal.SIGINT)}") == 0
    assert_same_training(the_run(tmp_path / "straight"), resumed)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_leaves_no_run_folder(train, tmp_path, signum, code):
    validation = "data.params.val_urls=shards/s-000000.tar"
    assert train(f"--max_steps 2 {validation} {sending(-1, signum)}") == code
    assert not list(tmp_path.glob("logs/*"))


def test_a_second_ctrl_c_quits_at_once(train, tmp_path):
    assert train(f"--max_steps 4 {sending(3, signal.SIGINT)} lightning.callbacks.send.params.times=2") == 130
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_run_that_has_its_steps_says_so(train, tmp_path, caplog):
    train("--max_steps 3")
    assert "Nothing was trained" not in caplog.text
    assert train(f"--resume {the_run(tmp_path / 'logs')} --max_steps 2") == 0
    assert "already at step 3 (max_steps=2)" in caplog.text


def test_piped_output_is_a_few_lines(train, capsys, caplog, recwarn):
    caplog.set_level(logging.INFO)
    validation = "data.params.val_urls=shards/s-000000.tar model.params.monitor=nope"
    assert train(f"--max_steps 18 --log_every_n_steps 50 --enable_model_summary True {validation}") == 0
    output = capsys.readouterr()
    assert not output.out and not output.err
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "img/s" in line] == [
        line for line in said if line.startswith("Epoch 2, step 18: ")
    ]
    assert any(line.endswith("parameters, of which 246 K are trained") for line in said)
    assert not [line for line in said if "FLOP" in line or "TPU" in line or "weights_only" in line]
    assert not [warning for warning in recwarn if "logging interval" in str(warning.message)]
    (complaint,) = (line for line in said if "No best checkpoints" in line)
    assert "'nope' is not logged (" in complaint and "val/loss_simple_ema" in complaint and "data?" not in complaint


def test_the_bar_of_a_run_that_goes_on_within_an_epoch_is_full_at_its_end(train, tmp_path, capsys, monkeypatch):
    train("--max_steps 2")
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert train(f"--resume {the_run(tmp_path / 'logs')} --max_steps 4") == 0
    assert "| 4/4 [" in capsys.readouterr().out


def test_sigusr1_saves_and_goes_on(train, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "ldm.training.resume.save_checkpoint", lambda content, path: saved.append((content["global_step"], path.name))
    )
    assert train(f"--max_steps 5 {sending(2, signal.SIGUSR1)}") == 0
    assert saved == [(2, "last.ckpt"), (5, "last.ckpt")]


def test_a_real_ctrl_c_reaches_workers_too_and_the_resumed_run_is_the_straight_one(train, tmp_path):
    """The signal goes to the whole process group, as from a terminal, at whatever moment it is."""
    line = [sys.executable, str(ROOT / "main.py"), "-b", "tiny.yaml", "-t", "--no-test", "-l", "stopped"]
    line += ["data.params.num_workers=2", "lightning.modelcheckpoint.params.every_n_train_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
    with subprocess.Popen(line, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("stopped/*/checkpoints/last.ckpt")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    stopped = the_run(tmp_path / "stopped")
    step = state(stopped / "checkpoints" / "last.ckpt")["global_step"]
    go_on = f"go on with: python main.py --resume {stopped.relative_to(tmp_path)} -t\n"
    assert f"Training stopped by SIGINT after step {step}; {go_on}" in output
    assert train(f"--resume {stopped} --max_steps {step + 3}") == 0
    train(f"-l straight --max_steps {step + 3}")
    assert_same_training(the_run(tmp_path / "straight"), stopped)


def test_the_2022_name_of_the_weights_to_start_from(train, tmp_path):
    train("-l first --max_steps 1")
    (the_run(tmp_path / "first") / "checkpoints" / "last.ckpt").rename(tmp_path / "released.ckpt")
    weights = state(tmp_path / "released.ckpt")["state_dict"]
    assert train("--finetune_from released.ckpt --scale_lr False --num_nodes 1 --max_steps 1 -l second") == 0
    tuned = state(the_run(tmp_path / "second") / "checkpoints" / "last.ckpt")
    assert tuned["global_step"] == 1
    for key in (key for key in weights if key.startswith("model.")):
        torch.testing.assert_close(tuned["state_dict"][key], weights[key], rtol=0, atol=2e-3)


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


def test_the_switches_of_2022_train(train, tmp_path, caplog):
    old = "--gpus 0, --accelerator ddp --precision 32 --num_nodes 1 --weights_summary None --replace_sampler_ddp False"
    old += " --progress_bar_refresh_rate 0 --auto_select_gpus False --checkpoint_callback True --benchmark True"
    assert train(f"{old} --max_epochs 1 --check_val_every_n_epoch 1 --scale_lr False") == 0
    assert "no CUDA device" in caplog.text and "--auto_select_gpus is ignored" in caplog.text
    run = the_run(tmp_path / "logs")
    assert set(logged(run, "lr-AdamW").values()) == {"0.001"}
    assert state(run / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_the_test_set_runs_after_training_and_alone(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, "-b tiny.yaml -t --max_steps 1")
    assert "No test: the config has no test set" in caplog.text
    run = the_run(tmp_path / "logs")
    run_main(monkeypatch, f"--resume {run} data.params.test_urls=shards/s-000000.tar")
    assert logged(run, "test/loss_ema")


def test_a_rehearsal_writes_no_checkpoint(train, tmp_path):
    assert train("--fast_dev_run True") == 0
    assert not list(tmp_path.rglob("*.ckpt"))


def test_exports_are_what_yaml_files_name():
    for name in ("DataModuleFromConfig", "WebDataNpyModuleFromConfig", "SetupCallback", "ImageLogger", "CUDACallback"):
        assert get_obj_from_str(f"main.{name}").__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'ImageLoger'"):
        main.ImageLoger  # noqa: B018


def test_another_logger_takes_the_place_of_tensorboard(train, tmp_path):
    assert train("--max_steps 1 -p paintings lightning.logger.target=tests.test_main.FakeWandbLogger") == 0
    run = the_run(tmp_path / "logs")
    folder = run.relative_to(tmp_path)
    made = get_obj_from_str("tests.test_main.FakeWandbLogger").made  # pytest knows this file by another name
    assert made == {"name": run.name, "save_dir": str(folder), "project": "paintings"}
    assert not (run / "tensorboard").exists() and logged(run, "train/loss")
