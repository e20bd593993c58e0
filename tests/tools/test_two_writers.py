"""Two commands at once that write the same set, file, folder or run: the second is refused, and the first is whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.child_runs import read_losses, start
from benchmarks.fork_server import start_script
from ldm.checkpoint import load_checkpoint
from ldm.locks import LOCK, locked
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.terminal import Terminal
from tests.training_runs import state, the_run, write_inputs
from tests.waiting import join, wait_for

HACK, MERGE, PREENCODE = (ROOT / "tools" / f"{name}.py" for name in ("hack_weights", "merge_release", "preencode"))


@contextlib.contextmanager
def stopped_at(lock: Path, tool: Path, *arguments: object) -> Iterator[BaseProcess]:
    """Start `tool`, and stop it (as Ctrl-Z does) while it holds `lock`; it goes on and must succeed at the end."""
    with tempfile.NamedTemporaryFile() as output:
        process = start_script([str(tool), *map(str, arguments)], Path.cwd(), Path(output.name))
        wait_for(lambda: lock.exists() and lock.read_bytes().endswith(b"}"), process)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            yield process
        finally:
            os.kill(process.pid, signal.SIGCONT)
            codes = join(process)
        assert codes == [0], output.read().decode()
    assert not lock.exists()


def is_refused(error: object, process: BaseProcess | None = None, what: str = "") -> bool:
    """Return True if `error` is one line that names host and process of the owner of `what`."""
    owner = f"process {process.pid if process else os.getpid()} on {os.uname().nodename!r} is writing it"
    return isinstance(error, str) and re.fullmatch(f"error: {re.escape(what)}.*: {owner} .*", error) is not None


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def options(work: Path, tiny_release: Path) -> list[object]:
    """Options of preencode.py for 40 images and 10 shards."""
    (work / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(work / f"images/{number}.png")
    given = ["--ckpt", tiny_release, "--config", RELEASE_CONFIG, "--images", "images", "--caption", "a cat"]
    return [*given, "--out", "set/%06d.tar", "--size", 64, "--shard-size", 4, "--device", "cpu"]


def test_a_terminal_that_is_closed_while_shards_are_written_leaves_none_cut_short(
    work: Path, options: list[object], run_tool: Callable
) -> None:
    terminal = Terminal(PREENCODE, *options, cwd=work)
    wait_for(lambda: len(list((work / "set").glob("*.tar"))) > 1, terminal.process)
    assert terminal.close() == 128 + signal.SIGHUP, terminal.said.decode()
    assert [path.name for path in (work / "set").rglob(".*")] == [".parts"]
    assert not json.loads((work / "set/index.json").read_text())["complete"]
    assert run_tool(PREENCODE, *options) is None
    index = json.loads((work / "set/index.json").read_text())
    assert index["complete"] and sum(shard["samples"] for shard in index["shards"]) == 40


def test_two_preencodings_with_different_options_do_not_mix(
    work: Path, options: list[object], run_tool: Callable
) -> None:
    with stopped_at(work / "set" / LOCK, PREENCODE, *options) as first:
        for more in (["--flip"], ["--overwrite"], []):
            assert is_refused(run_tool(PREENCODE, *options, *more), first, "--out set/%06d.tar")
    index = json.loads((work / "set/index.json").read_text())
    assert index["complete"] and sum(shard["samples"] for shard in index["shards"]) == 40
    assert len(list((work / "set").glob("*.tar"))) == 10


def test_two_hacks_of_one_file_do_not_mix(work: Path, tiny_release: Path, run_tool: Callable) -> None:
    options = ["--release", tiny_release, "--base", "demo_tiny.yaml", "--out", "hacked.ckpt"]
    with stopped_at(work / ".hacked.ckpt.lock", HACK, *options) as first:
        assert is_refused(run_tool(HACK, *options), first, "hacked.ckpt")
        merge = ("--train-ckpt", "other.ckpt", "--release", tiny_release, "--out", "hacked.ckpt")
        assert is_refused(run_tool(MERGE, *merge), first, "hacked.ckpt")
    assert load_checkpoint(work / "hacked.ckpt")["global_step"] == 0
    assert [path.name for path in work.iterdir()] == ["hacked.ckpt"]


def test_the_checkpoint_of_a_run_that_trains_is_not_written_by_others(
    work: Path, tiny_release: Path, run_tool: Callable
) -> None:
    write_inputs(work)
    run = start("-b tiny.yaml -t --no-test -l logs --max_steps 100000", work, work / "output", work / "losses")
    wait_for(lambda: list(work.glob("logs/*/checkpoints/last.ckpt")), run)
    folder = the_run(work / "logs").relative_to(work)
    last = folder / "checkpoints" / "last.ckpt"
    other = last.with_name("other.ckpt")
    (work / "link").symlink_to(work / last.parent)
    for tool, out in ((HACK, last), (HACK, other), (HACK, Path("link/last.ckpt")), (MERGE, other)):
        error = run_tool(tool, "--train-ckpt", last, "--release", tiny_release, "--out", out)
        assert isinstance(error, str) and f": process {run.pid} on {os.uname().nodename!r} is writing it" in error
    assert not other.exists() and not list(work.rglob(".*.ckpt.lock"))
    os.kill(run.pid, signal.SIGINT)
    assert join(run) == [0]
    assert state(last)["global_step"] == len(read_losses(work / "losses"))


def test_an_evaluation_waits_for_no_other_in_its_folder(work: Path, run_tool: Callable) -> None:
    options = ("--base", "a", "--ckpt", "b", "--set", "x=x.tar", "--out", "out")
    with locked(work / "out" / LOCK, "it"):
        assert is_refused(run_tool(ROOT / "tools/evaluate.py", *options), what="--out out")
    assert not (work / "out").exists()
