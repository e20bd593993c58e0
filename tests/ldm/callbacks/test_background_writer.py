"""Tests of a checkpoint that is written in a thread, from a copy."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ldm.callbacks import background_writer
from ldm.callbacks.background_writer import BackgroundWriter, Pair
from ldm.checkpoint import PickledCheckpoint, load_checkpoint
from ldm.checkpoint import writing as writing_module
from ldm.util import UserError
from tests.waiting import LIMIT, join


def test_the_file_holds_the_values_of_the_moment(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 3, dtype=torch.bfloat16).T, "c": torch.tensor(7)}
    state = {"step": 1, "state_dict": weights, "empty": torch.zeros(0, 3), "odd": torch.ones(3).to(torch.float8_e5m2)}
    expected = {key: value.clone() for key, value in weights.items()}
    writer, go_on = BackgroundWriter(), threading.Event()

    def write(checkpoint: PickledCheckpoint) -> None:
        assert go_on.wait(LIMIT)
        checkpoint.write(tmp_path / "last.ckpt")

    writer.start(PickledCheckpoint.of(state), write)
    assert writer.is_busy and not (tmp_path / "last.ckpt").exists()
    state["step"] = 2  # training goes on
    for weight in weights.values():
        weight.mul_(2)
    go_on.set()
    writer.finish()
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert loaded["step"] == 1 and loaded["empty"].shape == (0, 3)
    assert all(torch.equal(loaded["state_dict"][key], value) for key, value in expected.items())
    assert torch.equal(loaded["odd"].float(), torch.ones(3))


def test_an_error_of_the_thread_is_raised_when_it_is_waited_for() -> None:
    def fail(checkpoint: PickledCheckpoint) -> None:
        raise UserError("x.ckpt: was truncated")

    writer = BackgroundWriter()
    writer.start(PickledCheckpoint.of({}), fail)
    with pytest.raises(UserError, match="was truncated"):
        writer.finish()
    writer.finish()  # and only once


def test_without_memory_for_a_copy_the_caller_waits(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(background_writer, "available_memory", lambda: 10**9)
    writer, written = BackgroundWriter(), []
    for _ in range(2):
        writer.start(PickledCheckpoint.of({"a": torch.empty(10**8, device="meta")}), written.append)
    assert [checkpoint.tensors[0].device.type for checkpoint in written] == ["meta", "meta"], "no copy was made"
    (said,) = caplog.messages
    assert "a copy takes 0.4 GB of host memory, and 1.0 GB are available" in said


def test_without_address_space_for_a_copy_the_caller_waits(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    caplog.set_level("INFO")
    monkeypatch.setattr("mmap.mmap", refuse)
    writer, written = BackgroundWriter(), []
    writer.start(PickledCheckpoint.of({"a": torch.ones(3)}), written.append)
    assert not writer.is_busy and len(written) == 1
    assert "of host memory, and the system refuses it: Cannot allocate memory" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and memory is wiped by Linux alone")
def test_a_worker_forked_meanwhile_keeps_neither_the_copy_nor_the_file(tmp_path: Path, monkeypatch) -> None:
    """Data workers live as long as training. They would keep the memory, and the disk space of a replaced file."""
    writing, go_on, as_bytes = threading.Event(), threading.Event(), writing_module._bytes_of
    addresses = []

    def wait(tensor: torch.Tensor) -> memoryview:
        addresses.append(tensor.data_ptr())
        writing.set()
        assert go_on.wait(LIMIT)
        return as_bytes(tensor)

    def look(results: multiprocessing.SimpleQueue) -> None:
        values = ctypes.string_at(addresses[0], 1 << 26)
        results.put((any(values), [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]))

    monkeypatch.setattr(writing_module, "_bytes_of", wait)
    writer = BackgroundWriter()
    checkpoint = PickledCheckpoint.of({"a": torch.ones(1 << 26, dtype=torch.uint8)})
    writer.start(checkpoint, lambda copy: copy.write(tmp_path / "last.ckpt"))
    assert writing.wait(LIMIT)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    worker = context.Process(target=look, args=(results,))
    worker.start()
    has_copy, files = results.get()
    assert join(worker) == [0]
    go_on.set()
    writer.finish()
    assert not has_copy
    assert not [path for path in files if path.startswith(str(tmp_path))]
    assert torch.equal(load_checkpoint(tmp_path / "last.ckpt")["a"], checkpoint.tensors[0])


def hold_copy(monkeypatch: pytest.MonkeyPatch, until: threading.Event) -> list[int]:
    """Let the thread copy after `until`. Return the number of tensors that it copies, of each checkpoint."""
    counts, copy = [], BackgroundWriter._copy

    def copy_late(self: BackgroundWriter, later: Sequence[Pair], versions: Sequence[int]) -> None:
        counts.append(len(later))
        assert until.wait(LIMIT)
        copy(self, later, versions)

    monkeypatch.setattr(BackgroundWriter, "_copy", copy_late)
    return counts


def test_tensors_that_are_copied_later_may_change_after_the_copy(tmp_path: Path, monkeypatch) -> None:
    forward, written = threading.Event(), threading.Event()
    counts = hold_copy(monkeypatch, forward)

    def write(checkpoint: PickledCheckpoint) -> None:
        assert written.wait(LIMIT)
        checkpoint.write(tmp_path / "last.ckpt")

    weight, counter = torch.ones(1 << 18), torch.tensor(5)
    writer = BackgroundWriter()
    writer.start(PickledCheckpoint.of({"weight": weight.detach(), "counter": counter}), write, copy_later=True)
    counter += 1  # small ones may change at once
    forward.set()
    writer.wait_for_copy()
    weight.mul_(3)
    written.set()
    writer.finish()
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert counts == [1] and loaded["counter"] == 5 and torch.equal(loaded["weight"], torch.ones(1 << 18))


def test_weights_that_change_before_they_are_copied_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    changed, written, writer = threading.Event(), [], BackgroundWriter()
    counts = hold_copy(monkeypatch, changed)
    weight = torch.ones(1 << 18)
    checkpoint = PickledCheckpoint.of({"weight": weight.view(2, -1)})
    writer.start(checkpoint, written.append, copy_later=True)
    weight[0] = 2  # through another view
    changed.set()
    with pytest.raises(OSError, match="weights changed while they were copied; from now on, training waits"):
        writer.finish()
    assert not written
    writer.start(checkpoint, written.append, copy_later=True)
    writer.finish()
    assert len(written) == 1 and counts == [1, 0]


def test_a_thread_that_the_system_refuses_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = BackgroundWriter()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            writer.start(PickledCheckpoint.of({"a": torch.ones(3)}), lambda copy: None, copy_later=True)
    writer.wait_for_copy()
    writer.finish()
    assert not writer.is_busy
