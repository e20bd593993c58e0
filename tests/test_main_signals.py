"""Tests of signals to main.py: no signal loses training progress."""

import logging
import os
import signal
import subprocess
import sys

import pytest

from ldm.training.resume import AtomicCheckpointIO
from tests.conftest import ROOT
from tests.sent_signals import sending
from tests.terminal import Terminal
from tests.training_runs import assert_same_training, fixture_one_thread, fixture_train, state, the_run  # noqa: F401
from tests.waiting import LIMIT, wait_for


@pytest.mark.parametrize(
    ("signum", "code", "options"),
    [
        (signal.SIGINT, 0, ""),
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 129, ""),
        (signal.SIGINT, 0, "--accumulate_grad_batches 2"),
    ],
)
def test_a_stop_signal_loses_nothing(train, tmp_path, caplog, signum, code, options):
    caplog.set_level(logging.INFO)
    train(f"-l straight --max_steps 6 {options}")
    assert train(f"-l resumed --max_steps 6 {options} {sending(2, signum)}") == code
    resumed = the_run(tmp_path / "resumed")
    go_on = next(line for line in caplog.messages if "continue with" in line)  # its sender needs trust there
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


def test_sigusr1_saves_and_continues(train, tmp_path, monkeypatch):
    saved = []

    def note(self, content, path, storage_options=None):
        saved.append((content["global_step"], path.name))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    assert train(f"--max_steps 5 {sending(2, signal.SIGUSR1)}") == 0
    assert saved == [(2, "last.ckpt"), (5, "last.ckpt")]


def test_a_signal_during_the_last_report_harms_nothing(train, tmp_path, monkeypatch):
    reports = []

    def report(folders, *_):
        signal.raise_signal(signal.SIGUSR1)
        reports.append(folders)

    monkeypatch.setattr("ldm.reporting.report_file.write_report", report)
    assert train("--max_steps 1 lightning.report=true") == 0
    assert reports == [[the_run(tmp_path / "logs").relative_to(tmp_path)]]


def test_ctrl_c_in_a_terminal_reaches_workers_and_the_run_resumes_exactly(train, tmp_path):
    """The signal goes to the whole process group, as from a terminal, at whatever moment it is."""
    line = [sys.executable, str(ROOT / "main.py"), "-b", "tiny.yaml", "-t", "--no-test", "-l", "stopped"]
    line += ["data.params.num_workers=2", "lightning.modelcheckpoint.params.every_n_train_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
    with subprocess.Popen(line, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(tmp_path.glob("stopped/*/checkpoints/last.ckpt")), process)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 0, output
    stopped = the_run(tmp_path / "stopped")
    step = state(stopped / "checkpoints" / "last.ckpt")["global_step"]
    go_on = f"continue with: python main.py --resume {stopped.relative_to(tmp_path)} -t\n"
    assert f"Training stopped by SIGINT after step {step}; {go_on}" in output
    assert train(f"--resume {stopped} --max_steps {step + 3}") == 0
    train(f"-l straight --max_steps {step + 3}")
    assert_same_training(the_run(tmp_path / "straight"), stopped)


def test_a_terminal_that_is_closed_loses_nothing(train, tmp_path):
    options = ["lightning.modelcheckpoint.params.every_n_train_steps=2", "data.params.num_workers=1"]
    terminal = Terminal(ROOT / "main.py", "-b", "tiny.yaml", "-t", "--no-test", "-l", "stopped", *options, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("stopped/*/checkpoints/last.ckpt")), terminal.process)
    assert terminal.close() == 128 + signal.SIGHUP, terminal.said.decode()
    stopped = the_run(tmp_path / "stopped")
    assert not list(stopped.rglob(".*")), "neither a lock nor a temporary file stays"
    step = state(stopped / "checkpoints" / "last.ckpt")["global_step"]
    assert train(f"--resume {stopped} --max_steps {step + 3}") == 0
    train(f"-l straight --max_steps {step + 3}")
    assert_same_training(the_run(tmp_path / "straight"), stopped)
