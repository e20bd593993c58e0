"""Tests of writing checkpoints: other programs load them, and a file is written whole or not at all."""

import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.checkpoint import (
    Pending,
    cast,
    formats,
    load_checkpoint,
    load_state_dict,
    open_checkpoint,
    save_checkpoint,
    save_state_dict,
    writing,
)
from ldm.util import UserError
from tests.ldm.checkpoint.sample_tensors import safetensors_holds, same, tensors


def test_torch_load_reads_what_is_written(tmp_path):
    path = tmp_path / "model.ckpt"
    plain = {"epoch": 3, "loops": {"fit_loop": {"a": [1, 2.5, None]}}, "callbacks": {}}
    save_checkpoint({"state_dict": tensors(), **plain}, path)
    for loaded in (torch.load(path, weights_only=True), torch.load(path, mmap=True), load_checkpoint(path)):
        weights = loaded.pop("state_dict")
        assert loaded == plain
        for key, value in tensors().items():
            assert same(weights[key], value.detach()), key


def test_the_archive_is_sound_and_its_tensors_are_aligned(tmp_path):
    save_checkpoint(tensors(), tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "model.ckpt") as archive:
        assert archive.testzip() is None
    loaded = load_checkpoint(tmp_path / "model.ckpt")
    assert all(value.data_ptr() % 64 == 0 for value in loaded.values())


def test_a_view_is_written_at_its_own_size(tmp_path):
    save_checkpoint({"w": torch.zeros(1_000_000)[:10]}, tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").stat().st_size < 2000


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    weights = {key: value for key, value in tensors().items() if safetensors_holds(value)}
    save_state_dict(weights, tmp_path / "model.safetensors")
    for loaded in (load_file(tmp_path / "model.safetensors"), load_state_dict(tmp_path / "model.safetensors")):
        assert loaded.keys() == weights.keys()
        for key, value in weights.items():
            assert same(loaded[key], value.detach()), key


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_pending_tensors_are_computed_one_at_a_time(suffix, tmp_path, monkeypatch):
    events = []

    def pending(name):
        return Pending((3,), torch.float16, lambda: events.append(name) or torch.ones(3, dtype=torch.float16))

    monkeypatch.setattr(writing, "as_bytes", lambda tensor: events.append("bytes") or formats.as_bytes(tensor))
    save_state_dict({"a": pending("a"), "b": pending("b")}, tmp_path / f"m{suffix}")
    assert events == ["a", "bytes", "b", "bytes"]
    assert torch.equal(load_state_dict(tmp_path / f"m{suffix}")["b"], torch.ones(3, dtype=torch.float16))


def test_cast_keeps_a_tensor_of_the_right_dtype():
    tensor = torch.ones(3)
    assert cast(tensor, torch.float32) is tensor
    assert cast(tensor, torch.float16).compute().dtype == torch.float16


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_an_error_leaves_the_old_file_and_nothing_else(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")

    def fail():
        raise UserError("not finite")

    with pytest.raises(UserError, match="not finite"):
        save_state_dict({"a": torch.ones(3), "b": Pending((3,), torch.float32, fail)}, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"old")
    program = f"""
import os, signal, torch
from ldm.checkpoint import Pending, save_checkpoint
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint({{"a": torch.ones(1000), "b": Pending((3,), torch.float32, die)}}, {str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert path.read_bytes() == b"old"


def test_unknown_suffixes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.ckpt or \.safetensors"):
        save_state_dict({"a": torch.ones(1)}, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match="complex128"):
        save_state_dict({"a": torch.ones(1, dtype=torch.complex128)}, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.eye(2).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
)
def test_save_checkpoint_refuses_tensors_of_other_kinds(make, tmp_path):
    with pytest.raises(UserError, match="cannot be saved"):
        save_checkpoint({"state_dict": {"w": torch.ones(2), "x": make()}}, tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_save_state_dict_keeps_metadata(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    metadata = {"modelspec.title": "Cats \n é", "ss_steps": "3"}
    save_state_dict({"w": torch.ones(2)}, path, metadata=metadata)
    found = open_checkpoint(path).metadata
    assert {**found, "format": "pt"} == {"format": "pt", **metadata}
    if suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", **metadata}
    else:
        assert torch.load(path, weights_only=True)["metadata"] == metadata
    assert load_state_dict(path).keys() == {"w"}


def test_save_state_dict_writes_no_metadata_where_there_is_none(tmp_path):
    save_state_dict({"w": torch.ones(2)}, tmp_path / "model.ckpt", metadata={})
    assert load_checkpoint(tmp_path / "model.ckpt").keys() == {"state_dict"}
