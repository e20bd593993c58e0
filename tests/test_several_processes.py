"""Tests that several processes, over gloo on the CPU, have the losses of one with an equally large batch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import fork_server
from benchmarks.child_runs import read_losses, start
from ldm.training.arguments import parse_arguments
from ldm.training.run import plan_run
from tests.conftest import ROOT
from tests.ldm.shard_files import write_masked_set
from tests.training_runs import NOISE, assert_equal, assert_same_training, logged, state, the_run, write_inputs
from tests.waiting import join, wait_for

OPTIONS = "-t --no-test --max_steps 5 --scale_lr False data.params.null_cond_dropout=0.3"
LOSS_AWARE = "model.params.timestep_config.target=ldm.models.diffusion.timesteps.LossAware" + " ".join(
    f" model.params.timestep_config.params.{setting}" for setting in ("bins=2", "history=1")
)
LORA = "model.params.lora.rank=2 model.params.lora.targets=[attn2]"
MASKED = "model.params.loss_config.target=ldm.models.diffusion.masked_loss.Masked" + " ".join(
    f" model.params.loss_config.params.{setting}" for setting in ("by_area=true", "outside=0.2")
)
PRIOR = "data.params.prior_urls=shards/s-000001.tar"


class Runs:
    """Runs of main.py in a folder, in as many processes as asked for, with the environment that torchrun gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_inputs(folder)

    def start(self, name: str, line: str, ranks: int = 1, launcher: str = "torchrun") -> list:
        """Start the processes of a run; `RANK` in the `line` is each one's own."""
        port = free_port()
        base = "" if "--resume" in line else f"-b tiny.yaml -l {name}"
        processes = []
        for rank in range(ranks):
            environment = _environment(launcher, str(rank), str(ranks), port) if ranks > 1 else {}
            files = (self.folder / f"{name}-{rank}.output", self.folder / f"{name}-{rank}.losses")
            words = f"{base} {OPTIONS} {line}".replace("RANK", str(rank))
            processes.append(start(words, self.folder, *files, environment))
        return processes

    def __call__(self, name: str, line: str, ranks: int = 1, launcher: str = "torchrun") -> Path:
        processes = self.start(name, line, ranks, launcher)
        assert join(*processes) == [0] * ranks, self.said(name)
        return the_run(self.folder / name)

    def said(self, name: str) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"{name}-*.output")))

    def losses(self, name: str) -> dict[int, float]:
        """Return the mean loss per optimizer step, over batches and processes of equal size."""
        noted: dict[int, list[float]] = {}
        for path in self.folder.glob(f"{name}-*.losses"):
            for (step, _), (loss,) in read_losses(path).items():
                noted.setdefault(step, []).append(float.fromhex(loss))
        return {step: sum(values) / len(values) for step, values in sorted(noted.items())}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _environment(launcher: str, rank: str, ranks: str, port: str) -> dict[str, str]:
    """Return the environment that `launcher` gives to a process on a separate machine."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if launcher == "torchrun":
        sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        return address | sizes | {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "RANK": rank, "LOCAL_RANK": rank}
    sizes = {
        "SLURM_NTASKS": ranks,
        "SLURM_NTASKS_PER_NODE": ranks,
        "SLURM_STEP_NUM_TASKS": ranks,
        "SLURM_STEP_NUM_NODES": "1",
    }
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    return address | sizes | job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


# (name of the run, processes, batch of each, batches per step)
DISTRIBUTIONS = (("two", 2, 2, 1), ("two-by-two", 2, 1, 2), ("four", 1, 1, 4))


@pytest.mark.parametrize(
    ("data", "distributions", "launcher"),
    [
        ("", DISTRIBUTIONS, "torchrun"),
        (PRIOR, DISTRIBUTIONS[1:2], "srun"),
        (f"-b weights.yaml {NOISE} data.params.num_workers=1", DISTRIBUTIONS[1:2], "torchrun"),
        (f"-b masks.yaml {MASKED}", DISTRIBUTIONS[1:2], "torchrun"),
    ],
    ids=["plain", "prior-srun", "weights-noise-worker", "masks"],
)
def test_the_losses_do_not_depend_on_the_distribution_of_a_batch(
    runs: Runs, data: str, distributions: tuple[tuple[str, int, int, int], ...], launcher: str
) -> None:
    (runs.folder / "weights.yaml").write_text(
        "data: {params: {training_urls: [{urls: shards/s-000000.tar, weight: 2.5}, "
        "{urls: shards/s-000001.tar, weight: 1.5}]}}"  # 24 samples, so that no step of an epoch is smaller
    )
    masked = write_masked_set(runs.folder / "masked")
    (runs.folder / "masks.yaml").write_text(f"data: {{params: {{training_urls: [{{urls: {masked}, weight: 4}}]}}}}")
    whole = runs("whole", f"data.params.batch_size=4 {data}")
    expected = runs.losses("whole")
    assert list(expected) == [0, 1, 2, 3, 4]
    for name, ranks, batch, accumulate in distributions:
        words = f"data.params.batch_size={batch} --accumulate_grad_batches {accumulate} {data}"
        run = runs(name, words, ranks, launcher)
        assert len(list(run.glob("csv/*"))) == 1
        assert runs.losses(name) == pytest.approx(expected, rel=1e-5)
        if accumulate == 1:  # what is logged is the mean over the processes
            mean = {step: float(value) for step, value in logged(run, "train/loss").items()}
            assert mean == pytest.approx(expected, rel=1e-5)
        assert state(run / "checkpoints/last.ckpt")["global_step"] == 5
    assert logged(whole, "train/loss")


@pytest.mark.parametrize("options", [LOSS_AWARE, LORA], ids=["loss-aware", "lora"])
def test_two_processes_share_one_run_folder_and_resume_exactly(runs: Runs, options: str) -> None:
    """Resume a run that has state of its own in each process; the test of signals resumes a plain one."""
    straight = runs("straight", f"--max_steps 5 {options}", ranks=2)
    stopped = runs("stopped", f"--max_steps 2 --accumulate_grad_batches 1 {options}", ranks=2)
    assert sorted(path.name for path in stopped.iterdir()) == [
        "checkpoints",
        "configs",
        "csv",
        "events.jsonl",
        "tensorboard",
    ]
    assert len(list(stopped.glob("csv/*"))) == len(list(stopped.glob("tensorboard/events*"))) == 1
    runs("stopped", f"--resume {stopped} --max_steps 5", ranks=2)
    assert_same_training(straight, stopped)


def test_checkpoints_of_two_processes_are_the_same_from_a_thread(runs: Runs) -> None:
    """The first process writes them from a copy while both go on."""
    often = " ".join(
        f"lightning.modelcheckpoint.params.{setting}" for setting in ("every_n_train_steps=1", "save_last_k=9")
    )
    waiting = runs("waiting", f"{often} lightning.modelcheckpoint.params.in_background=false", ranks=2)
    threaded = runs("threaded", often, ranks=2)
    for step in range(1, 6):
        one, other = (state(run / f"checkpoints/step={step:09}.ckpt") for run in (waiting, threaded))
        assert one["global_step"] == step
        for part in ("state_dict", "optimizer_states", "loops", "epoch", "global_step"):
            assert_equal(one[part], other[part])


def _note_folder(rank: int) -> None:
    """Write the run folder to a file, after 1.2 s per rank, and wait for the other process, which rank 0 serves."""
    time.sleep(1.2 * rank)
    run = plan_run(parse_arguments(["-b", "tiny.yaml", "-t"]))
    Path(f"{rank}.part").write_text(str(run.folder))
    Path(f"{rank}.part").rename(f"{rank}.folder")
    wait_for(Path(f"{1 - rank}.folder").exists)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_processes_that_start_seconds_apart_share_one_run_folder(tmp_path: Path, launcher: str) -> None:
    port, log = free_port(), tmp_path / "log"
    processes = []
    for rank in (0, 1):
        environment = os.environ | _environment(launcher, str(rank), "2", port)
        processes.append(fork_server.start(_note_folder, rank, folder=tmp_path, output=log, environment=environment))
    wait_for((tmp_path / "0.folder").exists, processes[0])
    wait_for((tmp_path / "1.folder").exists, processes[1])
    assert join(*processes) == [0, 0], log.read_text()
    first, second = ((tmp_path / f"{rank}.folder").read_text() for rank in (0, 1))
    assert first.startswith("logs/") and second == first


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_to_one_process_stops_both_and_loses_nothing(runs: Runs, signum: int, code: int) -> None:
    processes = runs.start("stopped", "--max_steps 100000", ranks=2)
    losses = runs.folder / "stopped-1.losses"
    wait_for(lambda: len(read_losses(losses)) >= 4, *processes)
    for _ in range(2):  # the terminal's, or Slurm's, and torchrun's
        os.kill(processes[1].pid, signum)
    join(*processes)
    assert processes[1].exitcode == code
    stopped = the_run(runs.folder / "stopped")
    step = state(stopped / "checkpoints" / "last.ckpt")["global_step"]
    assert step == max(runs.losses("stopped")) + 1, "the last step begun was finished and saved"
    if signum == signal.SIGINT:  # the same checkpoint as the other signal's
        return
    runs("stopped", f"--resume {stopped} --max_steps {step + 2}", ranks=2)
    straight = runs("straight", f"--max_steps {step + 2}", ranks=2)
    assert_same_training(straight, stopped)


@pytest.mark.parametrize(
    ("split", "options"),
    [("training", ""), ("val", "--strategy fsdp model.params.use_ema=False data.params.num_workers=1")],
    ids=["training", "validation-fsdp-worker"],
)
def test_a_shard_that_fails_in_one_process_stops_both_and_loses_nothing(runs: Runs, split: str, options: str) -> None:
    for rank in range(2):
        shutil.copytree(runs.folder / "shards", runs.folder / f"own-{rank}")
    options += f" data.params.val_urls=shards/s-000000.tar data.params.{split}_urls=own-RANK/s-{{000000..000001}}.tar"
    processes = runs.start("failed", f"--max_steps 100000 {options}", ranks=2)
    wait_for(lambda: len(read_losses(runs.folder / "failed-1.losses")) >= 4, *processes)
    (runs.folder / "own-1" / "s-000001.tar").unlink()
    assert join(*processes) == [1, 1]
    said = r"error: own-1/s-000001.tar: was deleted or moved.* \(in process 1 of 2, counted from 0\)\n"
    assert len(re.findall(said, runs.said("failed"))) == 2, runs.said("failed")
    failed = the_run(runs.folder / "failed")
    step = state(failed / "checkpoints" / "last.ckpt")["global_step"]
    assert step == max(runs.losses("failed")) + 1
    shutil.copy(runs.folder / "shards" / "s-000001.tar", runs.folder / "own-1")
    runs("failed", f"--resume {failed} --max_steps {step + 2} {options}", ranks=2)
    straight = runs("straight", f"--max_steps {step + 2} {options}", ranks=2)
    assert_same_training(straight, failed)


def test_a_process_that_was_killed_ends_the_other_in_one_line(runs: Runs) -> None:
    processes = runs.start("killed", "--max_steps 100000", ranks=2)
    wait_for(lambda: len(read_losses(runs.folder / "killed-1.losses")) >= 4, *processes)
    processes[1].kill()
    assert join(*processes) == [1, -9]
    last = (runs.folder / "killed-0.output").read_text().splitlines()[-1]
    assert re.fullmatch(
        r"error: another process of the training has ended or .*resume the last checkpoint with --resume", last
    )


def test_torchrun_starts_the_given_number_of_processes(runs: Runs) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += [str(ROOT / "main.py"), "-b", "tiny.yaml", "-l", "logs", "--gpus", "0,1", *OPTIONS.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(line, cwd=runs.folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Run folder: ") == 1 and "Starting with 2 processes" in result.stdout + result.stderr
    assert state(the_run(runs.folder / "logs") / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_lightning_starts_the_processes_itself(command: Callable, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    words = f"-b tiny.yaml -l logs --accelerator cpu --devices 2 {OPTIONS}"
    result = command("main.py", *words.split())
    assert result.returncode == 0, result.stdout + result.stderr
    assert state(the_run(tmp_path / "logs") / "checkpoints" / "last.ckpt")["global_step"] == 5
