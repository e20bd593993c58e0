"""Writing checkpoints: whole or not at all, one tensor at a time.

Both writers stream: a `Pending` tensor exists only while it is written, and the pages of memory-mapped sources are
given back behind each tensor, so that peak memory does not grow with the file.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ldm.checkpoint.formats import SAFETENSORS_NAMES, STORAGE_NAMES
from ldm.checkpoint.mapped import MappedFile
from ldm.files import atomic_write
from ldm.util import UserError

_ALIGNMENT = 64  # bytes, as torch.save aligns storages
_ROOT = "archive"


@dataclass(frozen=True, eq=False)
class Pending:
    """A tensor that `compute` gives when its turn to be written comes. Its shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | Pending:
    """`tensor` itself if it has `dtype`, else converted when it is written."""
    if tensor.dtype == dtype:
        return tensor
    return Pending(tuple(tensor.shape), dtype, lambda: tensor.to(dtype))


def save_checkpoint(content: Mapping[str, Any], path: str | Path, *, sources: Sequence[MappedFile] = ()) -> None:
    """Write `content` in the zip format of `torch.save`; its tensors may be `Pending`.

    `sources` are the files that tensors of `content` are mapped from; none of these tensors may have been written to.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        pickled, tensors = _pickle(content)
        _write_record(archive, "data.pkl", pickled)
        _write_record(archive, "byteorder", sys.byteorder.encode())
        for key, tensor in enumerate(tensors):
            _write_record(archive, f"data/{key}", _bytes_of(tensor))
            _give_back(sources)
        _write_record(archive, "version", b"3\n")


def save_state_dict(
    state_dict: Mapping[str, torch.Tensor | Pending], path: str | Path, *, sources: Sequence[MappedFile] = ()
) -> None:
    """Write weights as `.safetensors`, or as a `.ckpt` that holds `{"state_dict": ...}`, by the suffix of `path`.

    Raises:
        UserError: another suffix.
    """
    check_suffix(path)
    if Path(path).suffix == ".ckpt":
        save_checkpoint({"state_dict": dict(state_dict)}, path, sources=sources)
        return
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        _write_safetensors(state_dict, file, sources)


def check_suffix(path: str | Path) -> None:
    """Raise `UserError` unless weights can be written to a file of this name."""
    if Path(path).suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"{path}: the name must end in .ckpt or .safetensors, which decides the format")


@dataclass(frozen=True, eq=False)
class _Storage:
    """Stands for the bytes of one tensor in the pickle."""

    kind: type
    key: str
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles as `torch.save` does, but keeps each tensor for later, with a contiguous storage of its own."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)  # the protocol that torch.load(weights_only=True) reads
        self.tensors: list[torch.Tensor | Pending] = []

    def persistent_id(self, value: Any) -> Any:
        if torch.is_storage(value):
            raise TypeError("a bare storage cannot be saved; save a tensor")
        return ("storage", value.kind, value.key, "cpu", value.numel) if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, torch.nn.Parameter, Pending):
            return NotImplemented  # a tensor subclass reduces to a class and plain tensors
        key, size = str(len(self.tensors)), torch.Size(value.shape)
        self.tensors.append(value)
        stride = torch.empty(size, device="meta").stride()
        if value.dtype in STORAGE_NAMES:
            storage = _Storage(getattr(torch, STORAGE_NAMES[value.dtype]), key, size.numel())
            return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(size), stride, False, OrderedDict())
        storage = _Storage(torch.UntypedStorage, key, size.numel() * value.dtype.itemsize)
        args = (storage, 0, tuple(size), stride, False, OrderedDict(), value.dtype)
        return torch._utils._rebuild_tensor_v3, args


def _pickle(content: Any) -> tuple[bytes, list[torch.Tensor | Pending]]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    return buffer.getvalue(), pickler.tensors


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    record = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    record.file_size = len(data)  # known beforehand, so that zipfile takes 64-bit fields only where they are needed
    start = archive.fp.tell() + 30 + len(record.filename)
    padding = -(start + 4) % _ALIGNMENT
    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(record, "w") as file:
        file.write(data)


def _write_safetensors(
    state_dict: Mapping[str, torch.Tensor | Pending], file: BinaryIO, sources: Sequence[MappedFile]
) -> None:
    # Wide dtypes first, as the format's own writer does: every tensor is then aligned to its dtype.
    names = sorted(state_dict, key=lambda key: (-state_dict[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = state_dict[name]
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise UserError(f"{name} has dtype {tensor.dtype}, which .safetensors cannot hold; write a .ckpt")
        start, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        file.write(_bytes_of(state_dict[name]))
        _give_back(sources)


def _bytes_of(tensor: torch.Tensor | Pending) -> memoryview:
    if isinstance(tensor, Pending):
        computed = tensor.compute()
        assert (tuple(computed.shape), computed.dtype) == (tuple(tensor.shape), tensor.dtype)
        tensor = computed
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _give_back(sources: Sequence[MappedFile]) -> None:
    for source in sources:
        source.drop_pages()
