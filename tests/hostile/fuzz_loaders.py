"""Files for the fuzzer, our readers of them, and other programs' readers."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import open_checkpoint
from ldm.checkpoint.formats import as_bytes
from ldm.config.load import load_config as load_our_config
from ldm.config.load import plain
from ldm.encoding.jobs import read_record, write_record
from ldm.files import read_span
from ldm.images.captions import METADATA, from_metadata
from ldm.shards.index import INDEX, read_index
from ldm.shards.reader import decode_member
from ldm.shards.tar import index_tar, is_sample, split_name
from ldm.training.resume import read_training_checkpoint
from tests.hostile.sample_files import SAMPLE, npy_header, npy_of, tar_of
from tests.ldm.checkpoint.legacy_files import random_legacy

PICKLE_TOKENS = (b".", b"}", b")", b"t", b"R", b"\x81", b"(", b"K\xff", b"q\x01", b"h\x01", b"X\x01\0\0\0w", b"N")
JSON = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"1e999", b"NaN", b"\\u0000", b"\\ud800", b"[[")
NPY_TOKENS = (b"(", b")", b",", b"True", b"False", b"-", b"'<f4'", b"'>f2'", b"'|O'", b"'|b1'", b"1L", b"0x8", b"1_0")
TAR_TOKENS = (b"\0", b"7", b"0", b" ", b"/", b"..", b"x", b"L", b"g", b"2", b"\x80", b"ustar\0", b"8 size=3\n")
YAML_TOKENS = (
    b": ",
    b"- ",
    b"\n",
    b"  ",
    b"{",
    b"}",
    b"[",
    b"]",
    b"&a ",
    b"*a",
    b"!!int ",
    b"${model.x}",
    b"'",
    b"<<: ",
)


def comparable(value: Any) -> Any:
    """Return a form of `value` in which equal contents compare equal: NaN equals itself, and types count."""
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), as_bytes(value).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return "array", value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {repr(key): comparable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return "list" if isinstance(value, list) else "tuple", [comparable(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(map(repr, value))
    return type(value).__name__, repr(value)


def _write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Checkpoints.


def _weights(rng: random.Random) -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    choices = {
        "float": base[2:8].view(2, 3).t(),
        "half": base[:4].half(),
        "view": base[5:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "float8": base[:4].to(torch.float8_e4m3fn),
        "complex": base[:2].to(torch.complex64),
        "uint16": base[:3].to(torch.uint16),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    return {key: choices[key] for key in rng.sample(list(choices), rng.randint(1, 4))}


def _content(rng: random.Random) -> dict[Any, Any]:
    plain_data = {"epoch": 3, "x": [1.5, None, True, (2, "é")], "bytes": b"\xff\0", "set": {1, 2}, 5: 2**70}
    kept = dict(rng.sample(list(plain_data.items()), rng.randint(0, 3)))
    return {"state_dict": _weights(rng), **kept}


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def make_zip(rng: random.Random) -> bytes:
    return _saved(_content(rng))


def make_legacy(rng: random.Random) -> bytes:
    plain_data = _content(rng)
    del plain_data["state_dict"]
    return random_legacy(rng, plain_data)


def read_checkpoint(folder: Path, data: bytes) -> Any:
    return open_checkpoint(_write(folder, "model.ckpt", data)).content


def torch_load(data: bytes) -> Any:
    return _without_names(torch.load(io.BytesIO(data), weights_only=True))


def _without_names(value: Any) -> Any:
    """Return `value` without classes and functions, which ours leaves out: dropped from dicts, None elsewhere."""
    if isinstance(value, dict):
        pairs = [pair for pair in value.items() if not any(map(callable, pair))]
        return {key: _without_names(part) for key, part in pairs}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_without_names, value))
    return None if callable(value) else value


def make_sealed(rng: random.Random) -> bytes:
    """The pickle alone: what hits it passes no checksum, so it is put into a whole archive afterwards."""
    with zipfile.ZipFile(io.BytesIO(_saved(_sealed_content()))) as archive:
        return archive.read("archive/data.pkl")


def _sealed_content() -> dict[str, Any]:
    return {**_content(random.Random("sealed")), "state_dict": {**_weights(random.Random(3)), "w": torch.arange(6.0)}}


def _seal(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(_sealed_content()))) as whole, zipfile.ZipFile(file, "w") as archive:
        for record in whole.infolist():
            is_pickle = record.filename == "archive/data.pkl"
            archive.writestr(record.filename, pickled if is_pickle else whole.read(record))
    return file.getvalue()


def read_sealed(folder: Path, data: bytes) -> Any:
    return read_checkpoint(folder, _seal(data))


def load_sealed(data: bytes) -> Any:
    return torch_load(_seal(data))


# Training checkpoints: their structure is mutated, and the file itself is whole.


def _training() -> dict[str, Any]:
    weights = {"model.w": torch.ones(2, 2), "model.b": torch.ones(2)}
    moments = {n: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)} for n in range(2)}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1]}]
    return {
        "epoch": 1,
        "global_step": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"StepSeeds": {"seed": 23}, "ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [1e-4]}],
    }


_STRANGE = (None, True, -1, 1 << 70, float("nan"), "text", b"\xff", [], {}, (), [{}], {"a": 1}, torch.tensor(1.0))


def _strike(rng: random.Random, value: Any) -> Any:
    """Return `value` with one part left out, replaced by something strange, or struck itself."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(_STRANGE)
    changed = dict(value) if isinstance(value, dict) else list(value)
    place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.3:
        del changed[place]
    else:
        changed[place] = _strike(rng, value[place])
    return changed


def make_training(rng: random.Random) -> bytes:
    content = _training()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        content = _strike(rng, content) if isinstance(content, dict) else content
    return _saved(content)


def read_training(folder: Path, data: bytes) -> Any:
    return read_training_checkpoint(_write(folder, "last.ckpt", data)).content


# Safetensors.


def make_safetensors(rng: random.Random) -> bytes:
    weights = {key: value.contiguous().resolve_conj() for key, value in _weights(rng).items()}
    return safetensors.torch.save(weights, rng.choice((None, {"format": "pt"}, {"title": "é\n"})))


def load_safetensors(data: bytes) -> Any:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {"state_dict": safetensors.torch.load(data), "metadata": header.get("__metadata__") or {}}


# Arrays.


def make_npy(rng: random.Random) -> bytes:
    dtype = rng.choice(("<f2", ">f2", "<f4", ">f4", "<f8"))
    shape = rng.choice(((3,), (2, 3), (1, 2, 3), (8, 2, 2)))
    if rng.random() < 0.5:
        file = io.BytesIO()
        np.save(file, np.asarray(np.arange(np.prod(shape)).reshape(shape), dtype, order=rng.choice("CF")))
        return file.getvalue()
    shape_text = rng.choice((str(shape), "(True, 3)", "()", "(3, -1)", "(0,)", "(3,) ", "3", "(1<<40,)"))
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return npy_of(npy_header(repr(dtype), shape_text, rng.choice(("False", "True", "1"))), bytes(size))


def read_npy(folder: Path, data: bytes) -> Any:
    return decode_member("f8", bytearray(data), "a.f8.npy")


def load_npy(data: bytes) -> Any:
    file = io.BytesIO(data)
    array = np.load(file, allow_pickle=False)
    array = array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(array.astype(np.float32) if array.dtype == np.float64 else array)


# Tars.


def make_tar(rng: random.Random) -> bytes:
    kind = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    members = [(name.replace("0", str(n), 1), data) for n in range(rng.randint(1, 2)) for name, data in SAMPLE]
    if rng.random() < 0.3 and kind != tarfile.USTAR_FORMAT:
        members.append(("é" + "x" * rng.choice((1, 120)) + ".txt", b"text"))
    return tar_of(members, kind)


def read_tar(folder: Path, data: bytes) -> Any:
    path = _write(folder, "s.tar", data)
    with path.open("rb") as file:
        return {
            f"{sample.key}.{extension}": bytes(read_span(file.fileno(), *span, sample.key))
            for sample in index_tar(path)
            for extension, span in sample.spans.items()
        }


def stream_members(folder: Path, data: bytes) -> Any:
    from ldm.data.stream import ShardStream

    path = _write(folder, "s.tar", data)
    read = ShardStream._read(f"file:{path}")
    return {f"{key}.{extension}": bytes(part) for _, key, members in read for extension, part in members.items()}


def load_tar(data: bytes) -> Any:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = [(split_name(member.name.removeprefix("./")), member) for member in tar if member.isreg()]
        return {
            f"{key}.{extension}": tar.extractfile(member).read()
            for (key, extension), member in members
            if is_sample(key, extension)
        }


# JSON: indexes, records, metadata of images.


def make_index(rng: random.Random) -> bytes:
    shard = {"name": "s-0.tar", "samples": 3, "bytes": 512, "sha256": "ab" * 32}
    content = {"format": 2, "out": "s-{0..9}.tar", "complete": True, "autoencoder": "a" * 64, "text_tower": None}
    content |= {"scale_factor": 0.18215, "shards": [shard, {**shard, "name": "s-1.tar"}], "samples": 6}
    content |= {"failed": [{"name": "a.png", "reason": "x"}], "made_from": {"images": "cats"}}
    if rng.random() < 0.5:
        content = _strike_json(rng, content)
    return json.dumps(content, indent=rng.choice((None, 1))).encode()


def _strike_json(rng: random.Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice((None, True, -1, 1.5, 1 << 70, "", "text", "..", "\0", [], {}, [{}], {"a": 1}, [1]))
    changed = dict(value) if isinstance(value, dict) else list(value)
    place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.3:
        del changed[place]
    else:
        changed[place] = _strike_json(rng, value[place])
    return changed


def read_set_index(folder: Path, data: bytes) -> Any:
    _write(folder, INDEX, data)
    return read_index(folder)


def load_json(data: bytes) -> Any:
    return json.loads(data)


def make_record(rng: random.Random) -> bytes:
    content = {"name": "s-0.tar", "samples": 3, "bytes": 512, "sha256": "ab" * 32, "pictures": 4, "without_caption": 0}
    content |= {"failed": [{"name": "a.png", "reason": "x"}], "sizes": {"64x64": 3}, "f8": [[8, 8, 8]]}
    return json.dumps(_strike_json(rng, content) if rng.random() < 0.5 else content).encode()


def read_shard_record(folder: Path, data: bytes) -> Any:
    shard = folder / "s-0.tar"
    write_record(shard, {})
    (record,) = (folder / ".parts").glob("*.json")
    record.write_bytes(data)
    return read_record(shard)


def make_metadata(rng: random.Random) -> bytes:
    entries = [
        {"file_name": name, "text": text} for name, text in (("a.png", "tom"), ("b/c.png", "é  \n"), ("d.png", ""))
    ]
    return "\n".join(json.dumps(_strike_json(rng, e) if rng.random() < 0.3 else e) for e in entries).encode()


def read_metadata(folder: Path, data: bytes) -> Any:
    _write(folder, METADATA, data)
    return from_metadata(folder)


def load_metadata(data: bytes) -> Any:
    found = []
    for line in data.decode("utf-8-sig").split("\n"):
        if line.strip():
            entry = json.loads(line)
            text = " ".join((entry.get("text") or "").split())
            found.append((PurePosixPath(entry["file_name"]).as_posix(), text or None))
    return found


# Configs.


def make_config(rng: random.Random) -> bytes:
    text = "model:\n  base_learning_rate: 1.0e-4\n  target: torch.nn.Linear\n"
    text += "  params: &p {in_features: 2, out_features: 3}\n"
    text += "data:\n  params: {x: *p, y: '${model.params.in_features}', z: [1, 2.5, null, true, 'a b']}\n"
    text += rng.choice(("", "lightning:\n  trainer: {max_epochs: 3}\n  callbacks: {}\n", "lightning: {}\n"))
    return text.encode()


def read_config(folder: Path, data: bytes) -> Any:
    return plain(load_our_config([_write(folder, "c.yaml", data)]))


def load_config(data: bytes) -> Any:
    config = OmegaConf.create(data.decode())  # with the numbers of YAML 1.2, such as 1e-4
    return OmegaConf.to_container(config, resolve=True)
