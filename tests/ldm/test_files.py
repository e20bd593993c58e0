"""Files are there whole, or as they were."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import save_checkpoint
from ldm.files import atomic_write, claim_file, read_at_most
from ldm.locks import process_namespace, process_start
from ldm.util import UserError


def test_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == path.suffix
            temporary.write_text(text)
        assert path.read_text() == text
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


KILLED = """
import os, signal, sys
from ldm.files import atomic_write, read_at_most
from ldm.util import UserError
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "la[s]t.ckpt"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    host = os.uname().nodename
    others = {
        f".la[s]t.{host}.{os.getppid()}.ab.tmp.ckpt",  # of a process that runs
        ".la[s]t.another.machine.999999999.ab.tmp.ckpt",  # whose processes nobody here can ask for
        f".last.{host}.999999999-1-{process_namespace() + 1:x}.ab.tmp.ckpt",  # of another container
        f".last.{host}.{os.getpid()}-{process_start(os.getpid()):x}-{process_namespace():x}.ab.tmp.ckpt",
        ".la[s]t.x.tmp.ckpt",  # none of ours
    }
    gone = {
        f".last.{host}.999999999.ab.tmp.ckpt",  # of another file
        f".last.{host}.{os.getpid()}-1-{process_namespace():x}.ab.tmp.ckpt",  # an older process had this one's number
    }
    for name in others | gone:
        (tmp_path / name).touch()
    with atomic_write(path) as temporary:
        temporary.touch()
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, *others}


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """As containers do that share a folder, a host name and a process id."""
    path = tmp_path / "file.txt"
    with atomic_write(path) as one, atomic_write(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint({"state_dict": {"w": torch.zeros(1_000_000)}}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "last.ckpt")
    assert caught.value.strerror == "File too large"
    assert not list(tmp_path.iterdir())


def test_no_more_is_read_than_asked_for(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_at_most(path, 5) == b"12345"
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a hole, which takes no place on the disk
    with pytest.raises(UserError, match=r"a: has 1099511627776 bytes, more than the 5 "):
        read_at_most(path, 5)


def test_claim_file_gives_each_a_name_of_its_own(tmp_path):
    names = [tmp_path / f"{number}.png" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim_file(names), range(40)))
    assert sorted(claimed) == sorted(names)
