"""Files as memory: tensors whose values are read from disk when they are needed.

A loaded tensor lies in a private memory map. Touching a map of a file that somebody cuts short ends the process, and
the pages of a map count as its memory. So whoever streams through a checkpoint takes each tensor by `in_memory`, which
reads the file itself: no page of the map is touched, and none has to be given back.
"""

from __future__ import annotations

import io
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldm.files import forget_mapped, note_mapped, open_file
from ldm.util import UserError

# Bits of an entry of /proc/self/pagemap (Linux, admin-guide/mm/pagemap).
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61


@dataclass(frozen=True)
class _Source:
    """File behind a memory map, which begins at the address `start`."""

    path: Path
    descriptor: int
    state: tuple[int, int]  # size in bytes, time of change in ns
    start: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            UserError: the file is no longer what was opened.
        """
        self.check()
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:  # of a disk that fails
                error.filename = str(self.path)
                raise
            if not count:
                raise UserError(f"{self.path}: was cut short while it was read; start again with the whole file")
            done += count
        self.check()

    def check(self) -> None:
        if _state(self.descriptor) != self.state:
            raise UserError(f"{self.path}: was changed while it was read; start again with a file that stays")


_SOURCES: dict[int, _Source] = {}  # of the maps that are alive, by their addresses


class MappedFile:
    """Private memory map of the file at `path`: tensors made from it may be written to, the file does not change.

    Args:
        mapped: whether tensors lie in the map; else they are read at once.
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
        """Return up to `size` bytes at `offset`; fewer where the file ends."""
        buffer = bytearray(max(0, min(size, len(self) - offset)))
        self.source.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def stream(self) -> BoundedReader:
        """Return a stream from the beginning of the file."""
        return BoundedReader(self.source.descriptor, len(self))

    def check_unchanged(self) -> None:
        """Raise `UserError` if the file was written to, cut, or replaced by another one since it was opened."""
        self.source.check()
        try:
            now = self.source.path.stat()
        except FileNotFoundError:
            now = None
        if now is None or not os.path.samestat(now, self._identity):
            raise UserError(f"{self.source.path}: was replaced while it was opened; start again with a file that stays")

    def tensor(self, dtype: torch.dtype, offset: int, numel: int) -> torch.Tensor:
        """Return the 1-D tensor of `numel` elements at byte `offset`; a copy where the file does not align it."""
        size = numel * dtype.itemsize
        if numel < 0 or offset < 0 or offset + size > len(self.map):
            raise ValueError(f"a tensor at bytes {offset} to {offset + size}, but the file ends at {len(self.map)}")
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        if self.mapped and offset % dtype.itemsize == 0:
            return torch.frombuffer(self.map, dtype=dtype, count=numel, offset=offset)
        return _read(self.source, offset, size).view(dtype)


class BoundedReader(io.BufferedReader):
    """Stream of a file that makes no room for more bytes than the file has, whatever a pickle claims."""

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__(io.FileIO(os.dup(descriptor)))
        self.seek(0)  # the position belongs to the open file, which its other users read by offset
        self._size = size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of `tensor` in memory of their own, read from its file; any other tensor as it is.

    A tensor that was written to since it was loaded, or may have been, is returned as it is too.

    Raises:
        UserError: the file was cut short or changed since it was opened.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        return tensor
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel():
        return tensor
    address = tensor.data_ptr()
    source = next((s for s in _SOURCES.values() if s.start <= address < s.start + s.state[0]), None)
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
    """Return whether a page of the private map has been written to, and so differs from the file; True if unknown."""
    first, last = address // mmap.PAGESIZE, (address + size - 1) // mmap.PAGESIZE
    wanted = 8 * (last - first + 1)
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            entries = os.pread(file.fileno(), wanted, 8 * first)
    except OSError:  # no Linux, or no /proc
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
