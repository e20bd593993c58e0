"""Arrays, tars, JSON and configs for the fuzzer, our readers of them, and those of other programs."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ldm.config.load import SECTIONS, plain
from ldm.config.load import load_config as load_our_config
from ldm.data.stream import ShardStream
from ldm.encoding.jobs import read_record, write_record
from ldm.files import read_span
from ldm.images.metadata import METADATA, from_metadata
from ldm.shards.index import INDEX, read_index
from ldm.shards.members import decode_member
from ldm.shards.tar import index_tar, is_sample, split_name
from tests.hostile.fuzz_values import strike, write_file
from tests.hostile.sample_files import SAMPLE, npy_header, npy_of, tar_of

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
    b"'",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
    b"${model.x}",
)
_STRANGE = (None, True, -1, 1.5, 1 << 70, "", "text", "..", "\0", [], {}, [{}], {"a": 1}, [1])


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
    path = write_file(folder, "s.tar", data)
    with path.open("rb") as file:
        return {
            f"{sample.key}.{extension}": bytes(read_span(file.fileno(), *span, sample.key))
            for sample in index_tar(path)
            for extension, span in sample.spans.items()
        }


def stream_members(folder: Path, data: bytes) -> Any:
    path = write_file(folder, "s.tar", data)
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
    content |= {"variants": 3, "without_mask": 1}
    if rng.random() < 0.5:
        content = strike(rng, content, _STRANGE)
    return json.dumps(content, indent=rng.choice((None, 1))).encode()


def read_set_index(folder: Path, data: bytes) -> Any:
    write_file(folder, INDEX, data)
    return read_index(folder)


def load_json(data: bytes) -> Any:
    return json.loads(data)


def make_record(rng: random.Random) -> bytes:
    content = {"name": "s-0.tar", "samples": 3, "bytes": 512, "sha256": "ab" * 32, "images": 4, "without_caption": 0}
    content |= {"failed": [{"name": "a.png", "reason": "x"}], "sizes": {"64x64": 3}, "f8": [[8, 8, 8]]}
    content |= {"without_mask": 1}
    return json.dumps(strike(rng, content, _STRANGE) if rng.random() < 0.5 else content).encode()


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
    return "\n".join(json.dumps(strike(rng, e, _STRANGE) if rng.random() < 0.3 else e) for e in entries).encode()


def read_metadata(folder: Path, data: bytes) -> Any:
    return [(entry.name, entry.caption) for entry in from_metadata(write_file(folder, METADATA, data))]


def load_metadata(data: bytes) -> Any:
    found = []
    for line in data.decode("utf-8-sig").split("\n"):
        if line.strip():
            entry = json.loads(line)
            text = " ".join((entry.get("text") or "").split())
            found.append((PurePosixPath(entry["file_name"]).as_posix(), text or None))
    return found


def make_pairs(rng: random.Random) -> bytes:
    entries = [
        {"input_image": f"{name}.png", "edited_image": f"{name}.edited.png", "edit_prompt": text}
        for name, text in (("a", "as  snow"), ("b/c", "é"), ("d", ""))
    ]
    return "\n".join(json.dumps(strike(rng, e, _STRANGE) if rng.random() < 0.3 else e) for e in entries).encode()


def read_pairs(folder: Path, data: bytes) -> Any:
    return [tuple(entry) for entry in from_metadata(write_file(folder, METADATA, data), pairs=True)]


def load_pairs(data: bytes) -> Any:
    found = []
    for line in data.decode("utf-8-sig").split("\n"):
        if line.strip():
            entry = json.loads(line)
            text = " ".join((entry.get("edit_prompt") or "").split())
            before, after = (entry.get(key) for key in ("input_image", "edited_image"))
            names = [PurePosixPath(before).as_posix(), PurePosixPath(after).as_posix() if after else None]
            found.append((names[0], text or None, names[1]))
    return found


def make_sizes(rng: random.Random) -> bytes:
    content = {"source": "a.png", "original_size": [480, 640], "crop_top_left": [0, 9], "target_size": [64, 64]}
    content |= {"variants": [{"crop_top_left": [3, 1]}, {"crop": [0, 0, 9, 9], "crop_top_left": [0, 2]}]}
    return json.dumps(strike(rng, content, _STRANGE) if rng.random() < 0.5 else content).encode()


def read_sizes(folder: Path, data: bytes) -> Any:
    return decode_member("original_size", bytearray(data), "a.json").tolist()


def load_sizes(data: bytes) -> Any:
    return [float(side) for side in json.loads(data)["original_size"]]


def read_crops(folder: Path, data: bytes) -> Any:
    return decode_member("crop_top_left", bytearray(data), "a.json").tolist()


def load_crops(data: bytes) -> Any:
    content = json.loads(data)
    found = [[float(side) for side in view["crop_top_left"]] for view in (content, *(content.get("variants") or ()))]
    return found if len(found) > 1 else found[0]


# Configs.


def make_config(rng: random.Random) -> bytes:
    text = "model:\n  base_learning_rate: 1.0e-4\n  target: torch.nn.Linear\n"
    text += "  params: &p {in_features: 2, out_features: 3}\n"
    text += "data:\n  params: {x: *p, y: '${model.params.in_features}', z: [1, 2.5, null, true, 'a b']}\n"
    text += rng.choice(("", "lightning:\n  trainer: {max_epochs: 3}\n  callbacks: {}\n", "lightning: {}\n"))
    return text.encode()


def read_config(folder: Path, data: bytes) -> Any:
    return plain(load_our_config([write_file(folder, "c.yaml", data)]))


def load_config(data: bytes) -> Any:
    config = OmegaConf.create(data.decode())  # with the numbers of YAML 1.2, such as 1e-4
    sections = OmegaConf.to_container(config, resolve=True)
    # Sections of other programs are dropped with a warning, and empty ones count as left out.
    return {name: part for name, part in sections.items() if name in SECTIONS and part is not None}
