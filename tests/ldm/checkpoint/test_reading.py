"""Checkpoints of either kind load whole, and what is none is refused in one line."""

import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ldm.checkpoint import load_checkpoint, load_state_dict, open_checkpoint, save_state_dict
from ldm.util import UserError
from tests.ldm.checkpoint.sample_tensors import safetensors_holds, same, tensors


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_data_come_back(zipped, mmap, tmp_path):
    plain = {
        "epoch": 3,
        "list": [1, (2, 3.5), None, True],
        "bytes": b"\xff",
        "set": {1},
        "big": 2**70,
        "é": torch.float16,
    }
    content = {"state_dict": OrderedDict(tensors()), **plain}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(tmp_path / "model.ckpt", mmap=mmap)
    weights = loaded.pop("state_dict")
    assert loaded == plain
    assert list(weights) == list(content["state_dict"])
    for key, value in content["state_dict"].items():
        assert same(weights[key], value.detach()), key
        assert not weights[key].requires_grad


def test_views_of_one_storage_share_it_again(tmp_path):
    torch.save(tensors(), tmp_path / "model.ckpt")
    loaded = load_checkpoint(tmp_path / "model.ckpt")
    loaded["shared"][4] = -1.0
    assert loaded["transposed view"][0, 0] == -1.0


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    torch.save({"w": torch.ones(4)}, tmp_path / "model.ckpt")
    load_state_dict(tmp_path / "model.ckpt")["w"].zero_()
    assert torch.equal(load_state_dict(tmp_path / "model.ckpt")["w"], torch.ones(4))


def test_a_safetensors_file_loads_with_its_metadata(tmp_path):
    weights = {
        key: value.detach().contiguous().clone().resolve_conj().resolve_neg()
        for key, value in tensors().items()
        if safetensors_holds(value)
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt", "title": "x"})
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded["metadata"] == {"format": "pt", "title": "x"}
    assert loaded["state_dict"].keys() == weights.keys()
    for key, value in weights.items():
        assert same(loaded["state_dict"][key], value), key


def test_content_decides_and_not_the_name(tmp_path):
    weights = {"w": torch.ones(2)}
    save_file(weights, tmp_path / "model.ckpt")
    torch.save({"state_dict": weights}, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "model")
    for name in ("model.ckpt", "model.safetensors", "model"):
        assert torch.equal(load_state_dict(tmp_path / name)["w"], torch.ones(2))


@pytest.mark.parametrize("length", [0x3C, 0x280])
def test_a_safetensors_header_length_may_look_like_another_format(length, tmp_path):
    """0x3C is `<`, as of a web page; 0x280 begins like a pickle."""
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + torch.ones(2).numpy().tobytes())
    assert torch.equal(load_state_dict(path)["w"], torch.ones(2))


def zip_of(tmp_path, name="whole.ckpt"):
    torch.save({"state_dict": {"w": torch.ones(1000), "v": torch.ones(1000)}}, tmp_path / name)
    return (tmp_path / name).read_bytes()


def safetensors_of(tmp_path):
    save_file({"w": torch.ones(1000)}, tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


def legacy_of(tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    return (tmp_path / "legacy.ckpt").read_bytes()


BROKEN = {
    "empty": (lambda _: b"", "empty file"),
    "web page": (lambda _: b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "web page after a line break": (lambda _: b"\r\n<html>", "web page"),
    "git-lfs pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n",
        "git lfs pull",
    ),
    "text": (lambda _: b"Access denied, please log in first", "not a checkpoint"),
    "JSON": (lambda _: b'{"error":{"message": "gated"}}', "not a checkpoint"),
    "noise": (lambda _: bytes(range(7, 200)), "not a checkpoint"),
    "one byte": (lambda _: b"P", "not a checkpoint"),
    "gzip": (lambda _: b"\x1f\x8b\x08\x00rest", "unpack"),
    "zip cut short": (lambda t: zip_of(t)[:5000], "truncated"),
    "zip cut at its end": (lambda t: zip_of(t)[:-10], "truncated"),
    "zip of nothing": (lambda _: b"PK\x05\x06" + bytes(18), "empty zip"),
    "pickle cut short": (lambda t: legacy_of(t)[:100], "damaged"),
    "pickle without its data": (lambda t: legacy_of(t)[:-10], "damaged"),
    "pickle of another kind": (lambda _: b"\x80\x04]\x94.", "not written by torch.save"),
    "safetensors cut short": (lambda t: safetensors_of(t)[:-10], "truncated"),
    "safetensors cut in its header": (lambda t: safetensors_of(t)[:20], "truncated"),
    "safetensors with an absurd header length": (lambda _: b"\xff" * 8 + b'{"a": 1}', "damaged"),
    "safetensors with a header that is no JSON": (lambda _: (16).to_bytes(8, "little") + b"{" * 16, "damaged"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_checkpoint_is_refused_in_one_line(kind, tmp_path):
    make, meaning = BROKEN[kind]
    path = tmp_path / "broken.ckpt"
    path.write_bytes(make(tmp_path))
    with pytest.raises(UserError, match=meaning) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["safe_open", "ZipArchive"])
def test_a_lack_of_memory_is_not_called_damage(name, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("Cannot allocate memory (os error 12)") if name == "safe_open" else MemoryError

    monkeypatch.setattr(f"ldm.checkpoint.reading.{name}", fail)
    path = tmp_path / ("a.safetensors" if name == "safe_open" else "a.ckpt")
    save_state_dict({"a": torch.ones(1)}, path)
    with pytest.raises(MemoryError):
        load_checkpoint(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="folder"):
        load_checkpoint(tmp_path)


def test_a_zip_of_something_else_is_refused(write_zip):
    with pytest.raises(UserError, match="zip archive without a checkpoint"):
        load_checkpoint(write_zip(readme=b"hello"))


def test_a_missing_record_is_named(write_zip, tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as archive:
        pickled = archive.read("whole/data.pkl")
    with pytest.raises(UserError, match="data/0 is missing"):
        load_checkpoint(write_zip(data_pkl=pickled))


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), "text"])
def test_a_checkpoint_that_is_no_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="not a dict of weights"):
        load_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 1}, {"state_dict": [torch.ones(2)]}])
def test_a_checkpoint_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_state_dict(tmp_path / "model.ckpt")


@pytest.mark.parametrize("make", [zip_of, legacy_of, safetensors_of])
def test_any_damage_is_an_error_in_one_line_or_harmless(make, tmp_path):
    """Flips bytes over the whole file: it loads, or it is refused, and nothing else happens."""
    data = make(tmp_path)
    path = tmp_path / "damaged.ckpt"
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(data)
        position, value = (int(torch.randint(high, (), generator=generator)) for high in (len(data), 256))
        damaged[position if position % 2 else position % 700] = value
        path.write_bytes(damaged)
        try:
            load_state_dict(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("metadata", [None, 3, ["a"], {"a": 1}, {1: "a"}, {"a": torch.ones(1)}])
def test_OpenCheckpoint_takes_only_text_for_metadata(metadata, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "metadata": metadata}, tmp_path / "model.ckpt")
    assert open_checkpoint(tmp_path / "model.ckpt").metadata == {}


@pytest.mark.parametrize("part", ["model_ema.diffusion_modelout0w", "model.diffusion_model.out.0.w", "out.0.w"])
@pytest.mark.parametrize("nested", [True, False])
def test_load_state_dict_takes_files_of_one_part(part, nested, tmp_path):
    """A file may hold EMA weights alone, or the UNet alone, with or without its prefix."""
    weights = {part: torch.ones(2)}
    torch.save({"state_dict": weights} if nested else weights, tmp_path / "part.ckpt")
    save_file(weights, tmp_path / "part.safetensors")
    for name in ("part.ckpt", "part.safetensors"):
        assert load_state_dict(tmp_path / name).keys() == {part}


@pytest.mark.parametrize("name", ["model", "module", "ema", "params"])
def test_load_state_dict_takes_the_only_weights_of_a_file(name, tmp_path):
    weights = {"model.diffusion_model.out.0.w": torch.ones(2)}
    other = {"optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3, "args": {"lr": 1e-5}, "empty": {}}
    for content in ({name: weights, **other}, {"state_dict": {"state_dict": weights}}, {name: {"net": weights}}):
        torch.save(content, tmp_path / "model.pt")
        assert load_state_dict(tmp_path / "model.pt").keys() == weights.keys()
    torch.save({name: weights, "other": weights}, tmp_path / "two.pt")
    with pytest.raises(UserError, match=rf"two\.pt: has several dicts of weights \({name}, other\); save one"):
        load_state_dict(tmp_path / "two.pt")
