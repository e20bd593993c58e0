"""One process at a time: who waits, who is refused, and what a killed owner leaves."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from ldm.files import atomic_write
from ldm.locks import LOCK, check_not_written, is_running, locked, locked_file, process_start
from ldm.util import UserError
from tests.waiting import join, wait_for

fork = multiprocessing.get_context("fork")


def hold(path: Path, held, until) -> None:
    with locked(path, "the run"):
        held.set()
        until.wait()


def holder(path: Path):
    """Return a process that holds the lock, and the event that ends it."""
    held, until = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(path, held, until))
    process.start()
    wait_for(held.is_set, process)
    return process, until


def test_locked_refuses_a_second_process_and_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    process, until = holder(path)
    named = f"the run: process {process.pid} on '{os.uname().nodename}' is writing it"
    with pytest.raises(UserError, match=named), locked(path, "the run"):
        pass
    until.set()
    join(process)
    with locked(path, "the run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_locked_takes_over_from_a_killed_owner(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process, _ = holder(path)
    os.kill(process.pid, signal.SIGKILL)
    join(process)
    assert path.exists()
    with locked(path, "the run"):
        pass
    assert not path.exists()


def test_locked_is_not_kept_by_a_child_that_outlives_its_parent(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "the run"):
        until = fork.Event()
        child = fork.Process(target=until.wait)
        child.start()
    with locked(path, "the run"):
        pass
    until.set()
    join(child)


def test_locked_says_how_to_remove_that_of_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "a b.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": 1, "job": None}))
    with (
        pytest.raises(UserError, match=r"process 7 on 'elsewhere' .*no longer runs: rm '.*/a b.lock'"),
        locked(path, "the run"),
    ):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_locked_is_that_of_a_slurm_job_wherever_it_is_requeued(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": 1, "job": "12"}))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with locked(path, "the run"):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling", "second name", "large", "text", "pipe", "folder"])
def test_locked_writes_to_nothing_that_stands_in_its_place(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / ".lock", tmp_path / "other"
    other.write_text("precious" * (1000 if kind == "large" else 1))
    make = {
        "link": lambda: path.symlink_to(other),
        "dangling": lambda: path.symlink_to(tmp_path / "missing"),
        "second name": lambda: path.hardlink_to(other),
        "large": lambda: other.rename(path),
        "text": lambda: path.write_text("precious"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    make[kind]()
    with pytest.raises((UserError, IsADirectoryError), match=r"\.lock: (is a link|not a lock file)|\.lock'"):  # noqa: SIM117
        with locked(path, "the run"):
            pass
    assert kind == "large" or other.read_text() == "precious"
    assert not (tmp_path / "missing").exists() and os.path.lexists(path)
    assert kind != "text" or path.read_text() == "precious"


def test_locked_file_holds_the_run_whose_checkpoint_it_is(tmp_path: Path) -> None:
    for name in ("configs", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    for folder in ("checkpoints", "link"):
        with locked_file(tmp_path / folder / "last.ckpt"), pytest.raises(UserError, match="is writing it"):  # noqa: SIM117
            with locked(tmp_path / LOCK, "the run"):
                pass


def test_check_not_written_names_who_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    check_not_written(path)
    with locked_file(path), pytest.raises(UserError, match=f"a.ckpt: process {os.getpid()} on .* is writing it"):
        check_not_written(path)
    (tmp_path / ".a.ckpt.lock").write_text(json.dumps({"host": "elsewhere", "pid": 7}))  # of a killed process
    check_not_written(path)


def test_locked_file_takes_the_longest_names(tmp_path: Path) -> None:
    one, other = (tmp_path / ("ä" * 124 + end) for end in ("1.ckpt", "2.ckpt"))
    with locked_file(one), locked_file(other), atomic_write(one) as path:
        path.write_text("whole")
    assert one.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", '{"host": 1}', '{"host": "a", "pid": -1}', '{"host": "a", "pid": true}'])
def test_locked_takes_a_file_that_names_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path / ".lock", "the run"):
        pass


@pytest.mark.parametrize(("start", "refused"), [(process_start(os.getpid()), True), (1, False)], ids=["own", "other"])
def test_locked_without_flock_goes_by_process_and_start(tmp_path: Path, monkeypatch, start: int, refused: bool) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "start": start, "job": None}))
    if refused:
        with pytest.raises(UserError, match="is writing it"), locked(path, "the run"):
            pass
    else:
        with locked(path, "the run"):
            pass


def test_locked_names_the_file_that_cannot_be_locked(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path / ".lock", "the run"):
        pass


def test_locked_on_a_full_disk_names_the_file_and_leaves_none(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path / "x" / ".lock", "the run"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_locked_does_without_flock(tmp_path: Path, monkeypatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    with locked(tmp_path / ".lock", "the run"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_locked_file_leaves_nothing(tmp_path: Path) -> None:
    with locked_file(tmp_path / "x" / "a.ckpt"):
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == [".a.ckpt.lock"]
    assert not list(tmp_path.iterdir())


def test_is_running_knows_a_reused_number() -> None:
    assert is_running(os.getpid()) and is_running(os.getpid(), process_start(os.getpid()))
    assert not is_running(os.getpid(), 1) and not is_running(999999999)
