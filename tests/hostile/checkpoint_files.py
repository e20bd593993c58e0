"""Checkpoints that are broken, absurd, or would run what they name."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from tests.hostile.damage import TERABYTE, Corpus, damaged, mistaken


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5, dtype=torch.int64)}


def whole_checkpoint(zipped: bool = True) -> bytes:
    file = io.BytesIO()
    content = {"state_dict": weights(), "global_step": 3, "optimizer_states": [], "nested": [{"x": (1, None)}]}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def zip_of(
    records: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED, root: str = "archive/"
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records:
            archive.writestr(root + name, data)
    return file.getvalue()


def tensor_pickle(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], keys: int = 1) -> bytes:
    """Return the pickle of `{"w0": tensor, ...}`, each in a storage of `numel` floats."""

    class Storage(str):
        pass

    class Tensor:
        def __init__(self, key: str) -> None:
            self.key = key

        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (Storage(self.key), offset, size, stride, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> tuple | None:
            return ("storage", torch.FloatStorage, str(value), "cpu", numel) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({f"w{key}": Tensor(str(key)) for key in range(keys)})
    return file.getvalue()


def overlapping_zip(size: int = 1 << 20, count: int = 2000) -> bytes:
    """`count` records that all lie at the bytes of one."""
    file = io.BytesIO(zip_of([("data.pkl", tensor_pickle(size // 4, 0, (1,), (1,), count)), ("data/0", bytes(size))]))
    with zipfile.ZipFile(file, "a") as archive:
        (first,) = (record for record in archive.infolist() if record.filename == "archive/data/0")
        for key in range(1, count):
            record = zipfile.ZipInfo(f"archive/data/{key}")
            record.header_offset, record.CRC = first.header_offset, first.CRC
            record.file_size = record.compress_size = size
            archive.filelist.append(record)
        archive._didModify = True
    return file.getvalue()


def checkpoints(marker: Path) -> Corpus:
    yield from mistaken()
    for zipped in (True, False):
        yield from (
            (f"zip-{name}" if zipped else f"old-{name}", data)
            for name, data in damaged(whole_checkpoint(zipped), f"checkpoint {zipped}", 60)
        )
    command = f"touch {marker}".encode()
    for name, data in {
        "reduce": b"cos\nsystem\n(V" + command + b"\ntR.",
        "inst": b"(V" + command + b"\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nV" + command + b"\no.",
        "exec": b"cbuiltins\nexec\n(Vopen(" + repr(str(marker)).encode() + b", 'w')\ntR.",
        "deep": b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
        "endless": b"\x80\x04}(" + b")" + b"2\x86" * 80 + b"Nu.",
        "long": b"\x80\x04\x8e" + struct.pack("<Q", TERABYTE) + b"x.",
        "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    }.items():
        yield f"pickle-{name}", zip_of([("data.pkl", data)])
        yield f"bare-pickle-{name}", data
    for name, spec in {
        "numel": (TERABYTE, 0, (2,), (1,)),
        "size": (2, 0, (TERABYTE,), (1,)),
        "expanded": (2, 0, (TERABYTE,), (0,)),
        "product": (2, 0, (1 << 31, 1 << 31), (0, 0)),
        "offset": (2, TERABYTE, (2,), (1,)),
        "negative": (2, -1, (2,), (1,)),
        "negative-stride": (2, 0, (2,), (-1,)),
        "negative-size": (2, 0, (-2,), (1,)),
    }.items():
        yield f"tensor-{name}", zip_of([("data.pkl", tensor_pickle(*spec)), ("data/0", bytes(8))])
    good = [("data.pkl", tensor_pickle(2, 0, (2,), (1,))), ("data/0", bytes(8))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of what is the point
        twice = zip_of([*good, ("data/0", b"\xff" * 8)])
    yield "records-record-twice", twice
    yield "records-two-roots", zip_of([(f"{root}/{name}", data) for root in "ab" for name, data in good], root="")
    yield "records-compressed", zip_of([good[0], ("data/0", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    yield "records-overlapping", overlapping_zip()
    yield "records-many", zip_of([*good, *((f"data/{key}", b"") for key in range(1, 3000))])


def safetensors_of(header: bytes | dict, data: bytes = bytes(8), length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def safetensors() -> Corpus:
    yield from damaged(save(weights()), "safetensors", 60)
    two = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for name, header in {
        "overlap": {"a": two, "b": two},
        "behind": {"a": {**two, "data_offsets": [TERABYTE, TERABYTE + 4]}},
        "huge": {"a": {"dtype": "F32", "shape": [TERABYTE], "data_offsets": [0, 4 * TERABYTE]}},
        "product": {"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}},
        "negative": {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        "reversed": {"a": {**two, "data_offsets": [8, 4]}},
        "gap": {"a": {**two, "data_offsets": [4, 8]}},
        "short": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        "dtype": {"a": {**two, "dtype": "F31"}},
        "no-dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
        "list": {"a": [1, 2]},
        "numbers": {"a": {"dtype": "F32", "shape": [2.5], "data_offsets": [0, 8]}},
        "metadata": {"__metadata__": {"x": [1]}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        "nothing": {},
    }.items():
        yield name, safetensors_of(header)
    yield "deep", safetensors_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "length-huge", safetensors_of({"a": two}, length=TERABYTE)
    yield "length-most", safetensors_of({"a": two}, length=(1 << 64) - 1)
    yield "length-nothing", safetensors_of({"a": two}, length=0)
    yield "key-twice", safetensors_of(b'{"a":%s,"a":%s}' % (json.dumps(two).encode(), json.dumps(two).encode()))
