"""Files are there whole, or as they were."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import open_checkpoint, save_checkpoint
from ldm.cli.options import read_prompts
from ldm.config.load import load_config
from ldm.data.dropout import load_null
from ldm.encoding.jobs import read_record
from ldm.files import (
    atomic_write,
    check_file,
    check_within,
    claim_file,
    is_within,
    open_file,
    read_at_most,
)
from ldm.images.captions import read_caption
from ldm.images.find import ImageItem
from ldm.images.metadata import METADATA, from_metadata
from ldm.locks import process_namespace, process_start
from ldm.shards.index import INDEX, read_index
from ldm.shards.open import open_shards
from ldm.shards.tar import index_tar
from ldm.shards.verify import file_sha256
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
from ldm.files import atomic_write, check_within, is_within, read_at_most
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
    with pytest.raises(UserError, match=r"a: has 1099511627776 bytes, but the limit for such a file is 5"):
        read_at_most(path, 5)


def test_is_within_follows_links_and_dots(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    assert all(is_within(folder, path) for path in (folder, folder / "a" / "b", folder / "a" / "..", f"{folder}/./x"))
    for path in (tmp_path, folder / "..", folder / "out", folder / "out" / "x", tmp_path / "run-2", "/", "x"):
        assert not is_within(folder, path)
        with pytest.raises(UserError, match=r"place '.*': lies outside .*run"):
            check_within(folder, path, "place")
    for path in ("a\0b", folder / "circle"):
        with pytest.raises(UserError, match="is not a valid path"):
            is_within(folder, path)


KINDS = {
    "pipe": (os.mkfifo, "a named pipe"),
    "folder": (Path.mkdir, "folder"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "a device"),
    "socket": (lambda path: _bind(path), "a socket"),
}


def _bind(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fsencode(os.path.relpath(path)))  # such a name may have about 100 bytes


READERS = {
    "open_file": lambda path: open_file(path).read(),
    "check_file": check_file,
    "read_at_most": lambda path: read_at_most(path, 100),
    "open_checkpoint": open_checkpoint,
    "index_tar": index_tar,
    "open_shards": open_shards,
    "file_sha256": file_sha256,
    "read_index": lambda path: read_index(_renamed(path, INDEX).parent),
    "from_metadata": lambda path: from_metadata(_renamed(path, METADATA)),
    "ImageItem": lambda path: ImageItem("a.png", path).read(),
    "ImageItem in a tar": lambda path: ImageItem("a.png", path, (0, 10)).read(),
    "load_config": lambda path: load_config([path]),
    "read_prompts": lambda path: read_prompts([], path),
    "load_null": load_null,
    "atomic_write": lambda path: atomic_write(path).__enter__(),
    "read_record": lambda path: read_record(_moved_to_record(path)),
}


def _renamed(path, name):
    return path.rename(path.with_name(name))


def _moved_to_record(path):
    record = path.parent / ".parts" / "s.tar.json"
    record.parent.mkdir()
    path.rename(record)
    return path.parent / "s.tar"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_open_file_refuses_what_is_no_file_wherever_one_is_expected(kind, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, said = KINDS[kind]
    path = tmp_path / "there.tar"
    make(path)
    with pytest.raises(UserError, match=said) as caught:
        READERS[reader](path)
    assert len(str(caught.value).splitlines()) == 1


def test_open_file_follows_links_and_leaves_errors_of_the_system(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    with open_file(tmp_path / "link") as file:
        assert file.read() == b"abc"
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "b")
    with pytest.raises(UserError, match="not a valid file name"):
        open_file("a\0b")


def test_captions_that_are_no_files_are_errors_of_their_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    os.mkfifo(tmp_path / "a.txt")
    caption, error = read_caption(tmp_path / "a.txt")
    assert caption is None and "a named pipe" in error


def test_claim_file_gives_each_a_name_of_its_own(tmp_path):
    names = [tmp_path / f"{number}.png" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim_file(names), range(40)))
    assert sorted(claimed) == sorted(names)
