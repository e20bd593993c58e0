"""Atomic writers of checkpoints, one tensor at a time.

`torch.save` and `safetensors` need all tensors in memory. Here, a `Pending` or memory-mapped tensor is in memory only
while it is written, so that peak memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import mmap
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ldm.checkpoint.formats import SAFETENSORS_NAMES, STORAGE_NAMES, as_bytes, converted
from ldm.checkpoint.mapped import Unread, in_memory
from ldm.checkpoint.zip_writer import ZipWriter
from ldm.files import atomic_write
from ldm.util import refuse_if

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of madvise(2), which Python does not name
HASH = "modelspec.hash_sha256"  # metadata: the SHA-256 of the tensors of a `.safetensors` (ModelSpec 1.0)


@dataclass(frozen=True, eq=False)
class Pending:
    """Tensor of known shape and dtype that `compute` returns when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class InParts:
    """Tensor of known shape and dtype for a `.safetensors`. `parts` yields its values, one part after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def computed(value: torch.Tensor | Pending) -> torch.Tensor:
    """Return the tensor of a `Pending`, or a tensor as `in_memory` does."""
    return value.compute() if isinstance(value, Pending) else in_memory(value)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | Pending:
    """Return `tensor` if it has `dtype`, else a `Pending` that converts it when it is written."""
    if tensor.dtype == dtype:
        return tensor
    return Pending(tuple(tensor.shape), dtype, lambda: converted(in_memory(tensor), dtype))


def save_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write `content` in the zip format of `torch.save`. Its tensors may be `Pending`.

    The archive has only the records `data.pkl`, `data/N` and `version`, as web UIs refuse other records. torch 1.13 and
    later can read it.
    """
    PickledCheckpoint.of(content).write(path)


@dataclass(frozen=True, eq=False)
class PickledCheckpoint:
    """Content of a checkpoint that does not change any more, except for its tensors.

    Args:
        pickled: the content without its tensors' values, in the format of `torch.save`.
        tensors: the tensors, in the order of their records.
    """

    pickled: bytes
    tensors: Sequence[torch.Tensor | Pending]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> PickledCheckpoint:
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(content)
        return cls(buffer.getvalue(), pickler.tensors)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def memory_for_copy(self) -> mmap.mmap:
        """Return host memory for `placed_in`. The system takes it back as soon as no copy is left.

        An allocator could keep it, and so could data workers that are forked while it exists. They see zeros in its
        place, which take no memory.

        Raises:
            OSError: the system refuses the memory.
        """
        size = max(sum(_aligned(tensor.nbytes) for tensor in self.tensors), 1)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # another system, or Linux before 4.14
            memory.madvise(_WIPE_ON_FORK)
        return memory

    def placed_in(self, memory: mmap.mmap) -> PickledCheckpoint:
        """Return the same with tensors in `memory`, without values. `copy_value` sets them."""
        starts = itertools.accumulate((_aligned(tensor.nbytes) for tensor in self.tensors), initial=0)
        room = torch.frombuffer(memory, dtype=torch.uint8)
        places = [
            room[start : start + tensor.nbytes].view(tensor.dtype).view(tuple(tensor.shape))
            for tensor, start in zip(self.tensors, starts, strict=False)
        ]
        return PickledCheckpoint(self.pickled, places)

    def write(self, path: str | Path) -> None:
        """Write the checkpoint to `path`, whole or not at all."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            archive = ZipWriter(file)
            archive.add("data.pkl", self.pickled)
            for key, tensor in enumerate(self.tensors):
                archive.add(f"data/{key}", _bytes_of(tensor))
            archive.add("version", b"3\n")
            if sys.byteorder != "little":  # readers assume little-endian
                archive.add("byteorder", sys.byteorder.encode())
            archive.finish()


def copy_value(place: torch.Tensor, tensor: torch.Tensor | Pending) -> None:
    """Copy `tensor`, of any device or layout, to `place`, a contiguous one of its shape and dtype on the host."""
    value = computed(tensor).detach()
    if tensor.dtype in STORAGE_NAMES:
        place.copy_(value)
    else:  # torch may be unable to copy such values
        as_bytes(place).copy_(as_bytes(value))


def save_state_dict(
    state_dict: Mapping[str, torch.Tensor | Pending | InParts],
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights as `.safetensors`, or as a `.ckpt` with `{"state_dict": ...}`, by the suffix of `path`.

    `metadata`, if not empty, is stored in the header of a `.safetensors`, or under `"metadata"` in a `.ckpt`. Its entry
    `HASH`, if it has one, becomes the digest of the tensors in a `.safetensors`, and is left out of a `.ckpt`.

    Raises:
        UserError: the suffix is neither of the two.
    """
    check_suffix(path)
    metadata = dict(metadata or {})
    if Path(path).suffix == ".ckpt":
        metadata.pop(HASH, None)
        save_checkpoint({"state_dict": dict(state_dict), **({"metadata": metadata} if metadata else {})}, path)
        return
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        _write_safetensors(state_dict, file, metadata)


def check_suffix(path: str | Path) -> None:
    """Raise `UserError` unless `path` has a suffix of a format for weights."""
    refuse_if(
        Path(path).suffix not in (".ckpt", ".safetensors"),
        f"{path}: the name must end in .ckpt or .safetensors, which selects the format, or in / for a folder of "
        "diffusers",
    )


@dataclass(frozen=True, eq=False)
class _Storage:
    """Placeholder in the pickle for the bytes of one tensor."""

    kind: type
    key: str
    numel: int


class _Pickler(pickle.Pickler):
    """Pickler in the format of `torch.save` that collects the tensors, each with its own contiguous storage."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)  # the protocol for torch.load(weights_only=True)
        self.tensors: list[torch.Tensor | Pending] = []

    def persistent_id(self, value: Any) -> Any:
        if torch.is_storage(value):
            raise TypeError("a bare storage cannot be saved; save a tensor")
        return ("storage", value.kind, value.key, "cpu", value.numel) if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, torch.nn.Parameter, Pending) and not isinstance(value, Unread):
            return NotImplemented  # a tensor subclass is pickled as a class and plain tensors
        refuse_if(
            isinstance(value, torch.Tensor)
            and (value.layout != torch.strided or value.is_quantized or value.is_nested),
            "a quantised, sparse or nested tensor cannot be saved; save a dense tensor instead",
        )
        key, size = str(len(self.tensors)), torch.Size(value.shape)
        self.tensors.append(value)
        stride = torch.empty(size, device="meta").stride()
        if value.dtype in STORAGE_NAMES:
            storage = _Storage(getattr(torch, STORAGE_NAMES[value.dtype]), key, size.numel())
            return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(size), stride, False, OrderedDict())
        storage = _Storage(torch.UntypedStorage, key, size.numel() * value.dtype.itemsize)
        args = (storage, 0, tuple(size), stride, False, OrderedDict(), value.dtype)
        return torch._utils._rebuild_tensor_v3, args


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _write_safetensors(
    state_dict: Mapping[str, torch.Tensor | Pending | InParts], file: BinaryIO, metadata: Mapping[str, str]
) -> None:
    # Wide dtypes first, like the reference writer, so that each tensor is aligned to its dtype.
    names = sorted(state_dict, key=lambda key: (-state_dict[key].dtype.itemsize, key))
    metadata = {"format": "pt", **metadata}
    if HASH in metadata:
        metadata[HASH] = f"0x{'0' * 64}"  # replaced by the digest, of equal length, after the tensors are written
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor = state_dict[name]
        refuse_if(
            tensor.dtype not in SAFETENSORS_NAMES,
            f"{name} has dtype {tensor.dtype}, which .safetensors cannot hold; write a .ckpt",
        )
        start, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    hashed = hashlib.sha256()
    for name in names:
        for data in _parts_of(state_dict[name]):
            if HASH in metadata:
                hashed.update(data)
            file.write(data)
    if HASH in metadata:
        file.seek(8)
        file.write(encoded.replace(metadata[HASH].encode(), f"0x{hashed.hexdigest()}".encode(), 1))


def _parts_of(tensor: torch.Tensor | Pending | InParts) -> Iterator[memoryview]:
    if not isinstance(tensor, InParts):
        yield _bytes_of(tensor)
        return
    size = 0
    for part in tensor.parts():
        assert part.dtype == tensor.dtype
        size += part.nbytes
        yield _bytes_of(part)
    assert size == tensor.nbytes


def _bytes_of(tensor: torch.Tensor | Pending) -> memoryview:
    if isinstance(tensor, Pending):
        computed = tensor.compute()
        assert (tuple(computed.shape), computed.dtype) == (tuple(tensor.shape), tensor.dtype)
        tensor = computed
    return memoryview(as_bytes(in_memory(tensor)).numpy())
