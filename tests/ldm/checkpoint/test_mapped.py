"""Loaded tensors: their values are those of the file, and what is written to them stays."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import (
    Pending,
    in_memory,
    load_into,
    load_state_dict,
    mapped,
    open_checkpoint,
    save_checkpoint,
    save_state_dict,
    weights_digest,
)
from ldm.checkpoint.formats import SAFETENSORS_NAMES, as_bytes
from ldm.checkpoint.mapped import Joined, MappedFile, Unaligned
from ldm.util import UserError
from tests.ldm.checkpoint.sample_tensors import same, tensors

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["zip", "legacy", "safetensors"])
def path(request, tmp_path):
    """Return the path of a file of one weight `w` that takes 100 pages."""
    weights = {"w": torch.arange(102_400.0)}
    path = tmp_path / "model.ckpt"
    if request.param == "safetensors":
        path = tmp_path / "model.safetensors"
        save_state_dict(weights, path)
    else:
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


def touched(tensor):
    """Return how many pages of `tensor` are in the memory of this process."""
    first, last = tensor.data_ptr() // 4096, (tensor.data_ptr() + tensor.nbytes - 1) // 4096
    count = last - first + 1
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        entries = os.pread(file.fileno(), 8 * count, 8 * first)
    return sum(entry >> 63 for entry in struct.unpack(f"<{count}Q", entries))


def test_in_memory_reads_every_kind_of_tensor(tmp_path):
    save_checkpoint(tensors(), tmp_path / "model.ckpt")
    torch.save(tensors(), tmp_path / "views.ckpt")
    for name in ("model.ckpt", "views.ckpt"):
        for key, value in open_checkpoint(tmp_path / name).content.items():
            assert same(in_memory(value), value), key
        shared = open_checkpoint(tmp_path / name).content["shared"]
        assert in_memory(shared) is not shared


def test_in_memory_gives_other_tensors_as_they_are():
    for tensor in (
        torch.ones(3),
        torch.ones(3)[1:],
        torch.empty(0),
        torch.empty(2, device="meta"),
        torch.eye(2).to_sparse(),
    ):
        assert in_memory(tensor) is tensor


def test_in_memory_keeps_the_sign_of_a_conjugate_view(tmp_path):
    save_checkpoint({"w": torch.tensor([1 + 2j])}, tmp_path / "model.ckpt")
    view = load_state_dict(tmp_path / "model.ckpt")["w"].conj()
    assert in_memory(view).tolist() == [1 - 2j] and in_memory(view.imag).tolist() == [-2.0]


@pytest.mark.parametrize("write", [lambda w: w.add_(1), lambda w: w.numpy().__iadd__(1), lambda w: w.data[5:6].add_(1)])
def test_a_write_to_a_loaded_tensor_is_never_undone(write, path, tmp_path):
    weights = load_state_dict(path)
    write(weights["w"])
    expected = weights["w"].clone()
    assert not torch.equal(expected, torch.arange(102_400.0))
    module = torch.nn.ParameterDict({"w": torch.zeros(102_400)})
    load_into(module, weights)
    assert torch.equal(module["w"], expected)
    for name in ("out.ckpt", "out.safetensors"):
        save_state_dict(weights, tmp_path / name)
        assert torch.equal(load_state_dict(tmp_path / name)["w"], expected)
    assert weights_digest(weights) == weights_digest({"w": expected})
    assert torch.equal(in_memory(weights["w"]), expected)
    assert torch.equal(weights["w"], expected)


def test_streaming_touches_no_page_of_the_map(path, tmp_path):
    weights = load_state_dict(path)
    around = 1  # the pages at both ends may hold other bytes of the file, such as its header
    load_into(torch.nn.ParameterDict({"w": torch.zeros(102_400)}), weights)
    save_state_dict(weights, tmp_path / "out.ckpt")
    save_state_dict(weights, tmp_path / "out.safetensors")
    weights_digest(weights)
    assert touched(weights["w"]) <= 2 * around
    weights["w"].sum()
    assert touched(weights["w"]) >= 100


def test_in_memory_trusts_no_page_where_the_system_does_not_tell(path, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda *args: b"")
    loaded = load_state_dict(path)["w"]
    assert in_memory(loaded) is loaded


@pytest.mark.parametrize("how", ["cut", "cut to nothing", "overwritten"])
def test_a_file_that_changes_while_it_is_read_is_one_line(how, path, tmp_path):
    weights = load_state_dict(path)

    def change():
        if how == "overwritten":
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(b"\xff" * 100)
            os.utime(path, ns=(1, 1))
        else:
            os.truncate(path, 0 if how == "cut to nothing" else 100_000)
        return torch.zeros(2)

    out = tmp_path / "out.ckpt"
    with pytest.raises(UserError, match=rf"{path.name}: was (cut|changed)") as caught:
        save_state_dict({"first": Pending((2,), torch.float32, change), **weights}, out)
    assert "\n" not in str(caught.value)
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match=r"was (cut|changed)"):
        load_into(torch.nn.ParameterDict({"w": torch.zeros(102_400)}), weights)


def test_a_file_replaced_while_it_is_opened_is_one_line(path, tmp_path):
    file = MappedFile(path)
    file.check_unchanged()
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    other.replace(path)
    with pytest.raises(UserError, match="was replaced"):
        file.check_unchanged()
    path.unlink()
    with pytest.raises(UserError, match="was replaced"):
        file.check_unchanged()


def test_a_file_replaced_after_it_was_opened_is_read_as_it_was(path, tmp_path):
    weights = load_state_dict(path)
    save_state_dict({"w": torch.zeros(3)}, tmp_path / "other.ckpt")
    (tmp_path / "other.ckpt").replace(path)
    save_state_dict(weights, tmp_path / "out.ckpt")
    assert torch.equal(load_state_dict(tmp_path / "out.ckpt")["w"], torch.arange(102_400.0))


@pytest.mark.slow
def test_exit_on_bus_error_names_the_file_and_leaves_nothing_half_written(path, tmp_path):
    program = f"""
import os
from ldm.cli.run import run
from ldm.checkpoint import Pending, load_state_dict, save_state_dict
weights = load_state_dict({str(path)!r})
def touch():
    os.truncate({str(path)!r}, 50_000)
    return weights["w"].clone()
def main():
    save_state_dict({{"w": Pending((102_400,), weights["w"].dtype, touch)}}, {str(tmp_path / "out.ckpt")!r})
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done
    assert done.stderr.strip() == f"error: {path}: was truncated while it was read; start again with the complete file"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_descriptors_and_maps_are_closed_with_the_last_tensor(path):
    def count():
        return sum(descriptor.exists() and descriptor.samefile(path) for descriptor in Path("/proc/self/fd").iterdir())

    before = count()
    weights = load_state_dict(path)
    assert count() > before
    part = weights["w"][10:20]
    del weights
    assert torch.equal(in_memory(part), torch.arange(10.0, 20.0)) and in_memory(part) is not part
    del part
    assert count() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unaligned_is_read_when_it_is_used_and_written_as_it_is(dtype, tmp_path):
    """Writers of safetensors before 0.3 did not pad the header, so that the values begin at any byte."""
    path, expected = tmp_path / "old.safetensors", torch.arange(600.0).reshape(20, 30).to(dtype)
    header = {"w": {"dtype": SAFETENSORS_NAMES[dtype], "shape": [20, 30], "data_offsets": [0, expected.nbytes]}}
    encoded = json.dumps(header).encode()
    encoded += b" " * (1 - len(encoded) % 2)  # of odd length
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + as_bytes(expected).numpy().tobytes())
    found = load_state_dict(path)["w"]
    assert isinstance(found, Unaligned) and (found.shape, found.dtype) == (expected.shape, dtype)
    assert torch.equal(in_memory(found), expected) and torch.equal(found[3] + 0, expected[3])
    assert torch.equal(found.T, expected.T) and torch.equal(found.to(torch.float32), expected.float())
    with pytest.raises(TypeError, match="cannot be changed in place"):
        found.add_(1)
    linear = torch.nn.Linear(30, 20, bias=False, dtype=dtype)
    load_into(linear, {"weight": found})
    assert torch.equal(linear.weight, expected)
    for name in ("again.ckpt", "again.safetensors"):
        save_state_dict({"weight": found}, tmp_path / name)
        assert torch.equal(load_state_dict(tmp_path / name)["weight"], expected)
    assert torch.equal(load_state_dict(path)["w"], expected)  # the file outlives its content's dict
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"old\.safetensors: was changed while it was read"):
        in_memory(found)


def test_joined_is_read_when_it_is_used_and_written_as_one(path, tmp_path):
    part = load_state_dict(path)["w"].reshape(100, 1024)
    joined = Joined([part, part])
    assert (joined.shape, joined.dtype, joined.nbytes) == ((200, 1024), torch.float32, 2 * part.nbytes)
    assert touched(part) == 0
    assert torch.equal(in_memory(joined)[100:], in_memory(joined)[:100]) and touched(part) == 0
    expected = torch.cat([part, part])
    assert torch.equal(joined + 0, expected) and torch.equal(joined[150], expected[150])
    linear = torch.nn.Linear(1024, 200, bias=False)
    load_into(linear, {"weight": joined})
    assert torch.equal(linear.weight, expected)
    for name in ("joined.ckpt", "joined.safetensors"):
        save_state_dict({"weight": joined}, tmp_path / name)
        assert torch.equal(load_state_dict(tmp_path / name)["weight"], expected)
    assert weights_digest({"weight": joined}) == weights_digest({"weight": expected})


def test_in_memory_while_another_thread_opens_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written in a thread while callbacks open releases."""
    sources: dict[int, object] = {}

    class Opening:
        state = (0, 0)

        @property
        def start(self) -> int:
            sources[len(sources)] = self
            return 0

    sources[0] = Opening()
    monkeypatch.setattr(mapped, "_SOURCES", sources)
    tensor = torch.ones(3)
    assert in_memory(tensor) is tensor
