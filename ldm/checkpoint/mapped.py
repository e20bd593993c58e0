"""Memory-mapped files, whose tensors are read from disk on access.

A loaded tensor lies in a private memory map. Access to the map of a truncated file ends the process, and the pages of
the map count as memory of the process. Code that processes a whole checkpoint therefore uses `in_memory`, which reads
from the file and touches no page of the map.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from ldm.files import forget_mapped, note_mapped, open_file
from ldm.util import refuse_if

# Bits of an entry in /proc/self/pagemap (Linux, admin-guide/mm/pagemap).
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61


@dataclass(frozen=True)
class _Source:
    """File of a memory map that begins at the address `start`."""

    path: Path
    descriptor: int
    state: tuple[int, int]  # size in bytes, modification time in ns
    start: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            UserError: the file was changed after it was opened.
        """
        self.check()
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:  # a disk error
                error.filename = str(self.path)
                raise
            refuse_if(not count, f"{self.path}: was truncated while it was read; start again with the complete file")
            done += count
        self.check()

    def check(self) -> None:
        refuse_if(
            _state(self.descriptor) != self.state,
            f"{self.path}: was changed while it was read; start again with an unchanging file",
        )


_SOURCES: dict[int, _Source] = {}  # sources of the existing maps, by address


class MappedFile:
    """Private memory map of the file at `path`. Writing to its tensors does not change the file.

    Args:
        mapped: tensors lie in the map. If false, they are read at once.
    """

    def __init__(self, path: Path, mapped: bool = True) -> None:
        with open_file(path) as file:
            descriptor = os.dup(file.fileno())
            self._identity = os.fstat(descriptor)
            self.map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        start = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()
        self.source = _SOURCES[start] = _Source(path, descriptor, _state(descriptor), start)
        note_mapped(path, descriptor, self.source.state[0])
        weakref.finalize(self.map, _close, self.source).atexit = False
        self.mapped = mapped

    def __len__(self) -> int:
        return len(self.map)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`, or fewer at the end of the file."""
        buffer = bytearray(max(0, min(size, len(self) - offset)))
        self.source.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def stream(self) -> BoundedReader:
        """Return a stream that starts at the beginning of the file."""
        return BoundedReader(self.source.descriptor, len(self))

    def check_unchanged(self) -> None:
        """Raise `UserError` if the file was changed, truncated or replaced after it was opened."""
        self.source.check()
        try:
            now = self.source.path.stat()
        except FileNotFoundError:
            now = None
        refuse_if(
            now is None or not os.path.samestat(now, self._identity),
            f"{self.source.path}: was replaced while it was opened; start again with an unchanging file",
        )

    def tensor(self, dtype: torch.dtype, offset: int, numel: int) -> torch.Tensor:
        """Return the tensor (numel,) at byte `offset`, as a copy if it is not aligned in the file."""
        size = numel * dtype.itemsize
        if numel < 0 or offset < 0 or offset + size > len(self.map):
            raise ValueError(f"a tensor at bytes {offset} to {offset + size}, but the file ends at {len(self.map)}")
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        if self.mapped and offset % dtype.itemsize == 0:
            return torch.frombuffer(self.map, dtype=dtype, count=numel, offset=offset)
        return _read(self.source, offset, size).view(dtype)

    def shaped(self, dtype: torch.dtype, offset: int, shape: Sequence[int]) -> torch.Tensor:
        """Return the tensor of `shape` at byte `offset`. One that is not aligned there is read when it is used."""
        numel = math.prod(shape)
        if not self.mapped or offset % dtype.itemsize == 0 or not 0 < numel * dtype.itemsize <= len(self) - offset:
            return self.tensor(dtype, offset, numel).reshape(shape)
        return Unaligned(self, dtype, offset, shape)


class Unread(torch.Tensor):
    """Tensor without memory of its own. Each operation reads its values."""

    def read(self) -> torch.Tensor:
        """Return the values in memory."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and isinstance(args[0], Unread):  # the change would be lost
            raise TypeError(f"{func}: a tensor that lies on the disk cannot be changed in place; change in_memory(it)")
        args, kwargs = tree_map_only(Unread, in_memory, (args, kwargs or {}))
        return func(*args, **kwargs)


class Unaligned(Unread):
    """Tensor of `file` at the byte `offset`, which is no multiple of the size of an element."""

    file: MappedFile
    offset: int

    @staticmethod
    def __new__(cls, file: MappedFile, dtype: torch.dtype, offset: int, shape: Sequence[int]) -> Unaligned:
        tensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        tensor.file, tensor.offset = file, offset
        return tensor

    def read(self) -> torch.Tensor:
        return _read(self.file.source, self.offset, self.nbytes).view(self.dtype).reshape(self.shape)


class Joined(Unread):
    """Tensor whose rows are those of several mapped `parts`, which each operation joins."""

    parts: Sequence[torch.Tensor]

    @staticmethod
    def __new__(cls, parts: Sequence[torch.Tensor]) -> Joined:
        rows = sum(len(part) for part in parts)
        joined = torch.Tensor._make_wrapper_subclass(cls, (rows, *parts[0].shape[1:]), dtype=parts[0].dtype)
        joined.parts = parts
        return joined

    def read(self) -> torch.Tensor:
        return torch.cat([in_memory(part) for part in self.parts])


class BoundedReader(io.BufferedReader):
    """Stream of a file that allocates at most the size of the file, whatever size a pickle claims."""

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__(io.FileIO(os.dup(descriptor)))
        self.seek(0)  # other users of the open file read by offset
        self._size = size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a memory-mapped or unread `tensor`, read from its files. Return any other tensor unchanged.

    A mapped tensor that may have been written to is also returned unchanged.

    Raises:
        UserError: the file was truncated or changed after it was opened.
    """
    if isinstance(tensor, Unread):
        return tensor.read()
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        return tensor
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel():
        return tensor
    address = tensor.data_ptr()
    sources = tuple(_SOURCES.values())  # a thread that writes a checkpoint reads them while others open files
    source = next((s for s in sources if s.start <= address < s.start + s.state[0]), None)
    if source is None:
        return tensor
    last = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.dtype.itemsize
    if _may_be_written(address, size):
        return tensor
    flat = _read(source, address - source.start, size).view(tensor.dtype)
    return torch.as_strided(flat, tensor.shape, tensor.stride())


def _read(source: _Source, offset: int, size: int) -> torch.Tensor:
    read = torch.empty(size, dtype=torch.uint8)
    source.read_into(memoryview(read.numpy()), offset)
    return read


def _may_be_written(address: int, size: int) -> bool:
    """Return True if a page of the private map was written to, or if this is unknown."""
    first, last = address // mmap.PAGESIZE, (address + size - 1) // mmap.PAGESIZE
    wanted = 8 * (last - first + 1)
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            entries = os.pread(file.fileno(), wanted, 8 * first)
    except OSError:  # not Linux, or without /proc
        return True
    if len(entries) != wanted:
        return True
    flags = np.frombuffer(entries, dtype=np.uint64)
    own = (flags & np.uint64(_PRESENT) != 0) & (flags & np.uint64(_OF_FILE) == 0)
    return bool((own | (flags & np.uint64(_SWAPPED) != 0)).any())


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _close(source: _Source) -> None:
    if _SOURCES.get(source.start) is source:
        del _SOURCES[source.start]
    forget_mapped(source.descriptor)
    os.close(source.descriptor)
