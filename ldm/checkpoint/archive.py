"""Readers of the two containers of `torch.save`: a zip archive since PyTorch 1.6, and before it a series of pickles."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.builders import Global, UnreadTensor
from ldm.checkpoint.formats import STORAGE_NAMES
from ldm.checkpoint.mapped import MappedFile
from ldm.checkpoint.pickled import read_pickle
from ldm.util import UserError

_STORAGE_DTYPES = {**{name: dtype for dtype, name in STORAGE_NAMES.items()}, "UntypedStorage": torch.uint8}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_FOLDER = 0x10  # DOS attribute of folders
_CHUNK = 1 << 26  # bytes of a record in memory during its check


def _storage_id(saved_id: Any) -> tuple[torch.dtype, str, int, Any]:
    """Return dtype, key, number of elements and (in old files) view of the storage of a persistent id."""
    kind, storage_type, key, _location, numel, *view = saved_id
    if kind != "storage" or not isinstance(key, str) or type(numel) is not int:
        raise ValueError("a persistent id that is not of a storage")
    name = storage_type.name if isinstance(storage_type, Global) else ""
    dtype = _STORAGE_DTYPES.get(name.rpartition(".")[2]) if name.startswith("torch.") else None
    if name.startswith("torch.Q"):
        raise UnreadTensor("has a quantised tensor, which is not supported; save its dequantize() instead")
    if dtype is None:
        raise ValueError(f"a storage of the unknown type {name}")
    if not 0 <= numel < 1 << 48:
        raise ValueError(f"storage {key} of an invalid size")
    return dtype, key, numel, view[0] if view else None


class ZipArchive:
    """Records of a `torch.save` zip, read through `file`."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.file = file
        try:
            with zipfile.ZipFile(path) as archive:
                listed = archive.infolist()
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: a truncated or damaged checkpoint ({error}); download it again") from error
        self.records = {record.filename: record for record in listed}
        if len(self.records) < len(listed):
            raise UserError(f"{path}: a zip archive with a repeated record; save the checkpoint again")
        pickles = [name for name in self.records if name.endswith("/data.pkl") and name.count("/") == 1]
        roots = [name.removesuffix("data.pkl") for name in pickles]
        if not roots:
            raise UserError(f"{path}: a zip archive without a checkpoint; unpack it, or name another file")
        if len(roots) > 1:
            raise UserError(f"{path}: a zip archive with {len(roots)} checkpoints; unpack it, and name one")
        self.root = roots[0]
        if f"{self.root}constants.pkl" in self.records:
            raise UserError(f"{path}: a TorchScript program, not a checkpoint; save its state_dict() with torch.save")

    def locate(self, name: str) -> tuple[int, int]:
        """Return byte offset and size of the record `name`. Raise `ValueError` for an invalid record."""
        record = self.records.get(self.root + name)
        if record is None:
            raise ValueError(f"record {name} is missing")
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise ValueError(f"record {name} is compressed or encrypted, unlike those of torch.save")
        if record.external_attr & _FOLDER:  # torch reads folders as empty
            raise ValueError(f"record {name} is marked as a folder")
        header = self.file.read(record.header_offset, 30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"record {name} has no header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return record.header_offset + 30 + name_length + extra_length, record.file_size

    def read(self, name: str) -> bytes:
        self.check(name)
        offset, size = self.locate(name)
        return self.file.read(offset, size)

    def check(self, name: str) -> None:
        """Compare the bytes of the record `name` with its checksum. A checksum of 0 means that torch.save wrote none.

        Without this check, a changed bit would become a wrong weight unnoticed.
        """
        offset, size = self.locate(name)
        expected, found = self.records[self.root + name].CRC, 0
        if offset + size > len(self.file):
            raise ValueError(f"record {name} is truncated")
        if not expected:
            return
        for start in range(offset, offset + size, _CHUNK):
            found = zlib.crc32(self.file.read(start, min(_CHUNK, offset + size - start)), found)
        if found != expected:
            raise ValueError(f"record {name} does not match its checksum")

    def load(self) -> Any:
        if self.root + "byteorder" in self.records and self.read("byteorder") != sys.byteorder.encode():
            raise ValueError("big-endian byte order")
        storages: dict[str, torch.Tensor] = {}
        claimed = 0

        def storage(saved_id: Any) -> torch.Tensor:
            nonlocal claimed
            dtype, key, numel, _ = _storage_id(saved_id)
            if key not in storages:
                offset, size = self.locate(f"data/{key}")
                claimed += size
                if claimed > len(self.file):  # bounds the work for copies and checks
                    raise ValueError("overlapping records")
                self.check(f"data/{key}")
                if numel * dtype.itemsize > size:
                    raise ValueError(f"storage {key} has {size} bytes, expected {numel * dtype.itemsize}")
                storages[key] = self.file.tensor(dtype, offset, numel)
            return storages[key]

        return read_pickle(io.BytesIO(self.read("data.pkl")), storage)


def load_legacy(file: MappedFile) -> Any:
    """Return the content of a file from before PyTorch 1.6.

    The file has three pickles of preamble, the object, the keys of the storages, and their data. A tensor may use a
    view of a storage, which has its own key, offset and size.
    """
    stream = file.stream()
    if _read_plain(stream) != _LEGACY_MAGIC or _read_plain(stream) != _LEGACY_PROTOCOL:
        raise ValueError("a pickle not written by torch.save")
    _read_plain(stream)  # type sizes of the writing machine
    start = stream.tell()

    roots: dict[str, tuple[torch.dtype, int]] = {}

    def note(saved_id: Any) -> torch.Tensor:
        dtype, key, numel, view = _storage_id(saved_id)
        if roots.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise ValueError(f"storage {key} has two descriptions")
        numel = numel if view is None else _view_of(view, numel)[2]
        return torch.empty(numel, dtype=dtype, device="meta")

    # The data follow the object that describes them. The object is therefore read twice.
    read_pickle(stream, note)
    storages: dict[str, torch.Tensor] = {}
    for key in _read_plain(stream):
        dtype, expected = roots[key]
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel != expected:
            raise ValueError(f"storage {key} has {numel} elements, expected {expected}")
        storages[key] = file.tensor(dtype, stream.tell(), numel)
        stream.seek(numel * dtype.itemsize, io.SEEK_CUR)

    views: dict[str, tuple[str, int, int]] = {}

    def storage(saved_id: Any) -> torch.Tensor:
        _, key, numel, view = _storage_id(saved_id)
        if view is None:
            return storages[key]
        name, offset, size = _view_of(view, numel)
        if views.setdefault(name, (key, offset, size)) != (key, offset, size):
            raise ValueError(f"view {name} has two descriptions")
        return storages[key][offset : offset + size]

    stream.seek(start)
    return read_pickle(stream, storage)


def _view_of(view: Any, numel: int) -> tuple[str, int, int]:
    """Return key, offset and size, in elements, of a `view` into a storage of `numel` elements."""
    name, offset, size = view
    if not isinstance(name, str) or type(offset) is not int or type(size) is not int:
        raise ValueError("a view that is not made of integers")
    if min(offset, size) < 0 or offset + size > numel:
        raise ValueError(f"a view of elements {offset} to {offset + size} in a storage of {numel}")
    return name, offset, size


def _read_plain(stream: Any) -> Any:
    return read_pickle(stream, _no_storage)


def _no_storage(saved_id: Any) -> Any:
    raise ValueError("an unexpected storage")
