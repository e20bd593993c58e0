"""A file as memory: tensors that are read from disk when they are touched."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch


class MappedFile:
    """A private memory map of the file at `path`: tensors made from it may be written to, the file does not change."""

    def __init__(self, path: Path, mapped: bool = True) -> None:
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.mapped = mapped

    def __len__(self) -> int:
        return len(self.map)

    def tensor(self, dtype: torch.dtype, offset: int, numel: int) -> torch.Tensor:
        """The 1-D tensor of `numel` elements at byte `offset`; a copy where the file does not align it."""
        size = numel * dtype.itemsize
        if numel < 0 or offset < 0 or offset + size > len(self.map):
            raise ValueError(f"a tensor at bytes {offset} to {offset + size}, but the file ends at {len(self.map)}")
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        if offset % dtype.itemsize:
            return torch.frombuffer(bytearray(self.map[offset : offset + size]), dtype=dtype)
        tensor = torch.frombuffer(self.map, dtype=dtype, count=numel, offset=offset)
        return tensor if self.mapped else tensor.clone()

    def drop_pages(self) -> None:
        """Give back the memory of all pages read so far; they are read again when touched. Undoes writes to tensors."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self.map.madvise(mmap.MADV_DONTNEED)
