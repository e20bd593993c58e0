"""Table of the samples of a shard: their keys, and place, size and shape of each member, as arrays.

For N samples in all, with M kinds of members, the arrays are

    keys            all sample keys in UTF-8, one after the other
    key_ends        int64 (N,): end of each key in `keys`
    offsets, sizes  int64, int32 (N, M): place of each member in its tar, in bytes; -1 for a missing member
    checksums       uint32 (N, M): CRC-32 of the tar header before each member
    arrays          int32 (N, M): number of the member's shape and type in `kinds`; -1 if it is no array of numbers
    has_sizes       uint8 (N, S): 1 where the sample's `json` has the entry of `SIZES`

The kinds of members are those of a shard's first sample, and the optional ones. Each sample must have the members that
are read.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE
from typing import NamedTuple

import numpy as np

from ldm.identity import Identity, identity_of_path
from ldm.remote.path import ShardPath
from ldm.shards import npy
from ldm.shards.members import decode_member
from ldm.shards.sample import ORIGIN, SIZES, TEXT_KEYS, number_types
from ldm.shards.spans import Read, open_spans
from ldm.shards.tar import TarSample, index_tar
from ldm.util import UserError

logger = logging.getLogger(__name__)

MOST_MEMBERS = 64  # kinds of members; a table has a column for each
_ARRAY = ".npy"

Kind = tuple[tuple[int, ...], str]  # shape and dtype of an array


@dataclass(frozen=True)
class Columns:
    """Arrays of a table, as described above."""

    keys: np.ndarray
    key_ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    arrays: np.ndarray
    has_sizes: np.ndarray


class MemberPlace(NamedTuple):
    """Place of a member in its tar, CRC-32 of its tar header, and number of its kind; -1 for none."""

    offset: int
    size: int
    checksum: int
    kind: int

    @property
    def part(self) -> tuple[int, int]:
        """Offsets of the tar header, and of the end of the content."""
        return max(0, self.offset - BLOCKSIZE), self.offset + self.size


@dataclass(frozen=True)
class ShardTable:
    """Table of the shard at `path`, of the file `identity`."""

    path: ShardPath
    identity: Identity
    extensions: list[str]
    kinds: list[Kind]
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns.offsets)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        ends = self.columns.key_ends
        start = ends[row - 1] if row else 0
        return self.columns.keys[start : ends[row]].tobytes().decode("utf-8", "surrogateescape")

    def keys(self) -> Iterator[str]:
        """Yield the keys of all samples."""
        text, start = self.columns.keys.tobytes(), 0
        for end in self.columns.key_ends.tolist():
            yield text[start:end].decode("utf-8", "surrogateescape")
            start = end

    def sample(self, row: int) -> TarSample:
        """Return the members of a sample."""
        places = zip(self.extensions, self.columns.offsets[row].tolist(), self.columns.sizes[row].tolist(), strict=True)
        return TarSample(self.key(row), {extension: (offset, size) for extension, offset, size in places if size >= 0})

    def members(self, row: int) -> list[MemberPlace]:
        """Return the members of a sample, by column."""
        columns = self.columns
        parts = columns.offsets, columns.sizes, columns.checksums, columns.arrays
        return list(map(MemberPlace, *(part[row].tolist() for part in parts)))

    def column(self, extension: str) -> int | None:
        """Return the number of the column of a kind of member, or None."""
        return self.extensions.index(extension) if extension in self.extensions else None


def fills(table: ShardTable, head: bytes) -> bool:
    """Return True if the members of a table fill its tar, from the first header `head` to the end mark.

    Nothing but the end mark and zeros, up to a full record, may follow them, as `tarfile` writes it.
    """
    is_there = table.columns.sizes >= 0
    starts = table.columns.offsets[is_there] - BLOCKSIZE
    if not starts.size:
        return False
    order = np.argsort(starts)
    blocks = -(-table.columns.sizes[is_there].astype(np.int64) // BLOCKSIZE)
    starts, ends = starts[order], (starts + BLOCKSIZE * (1 + blocks))[order]
    records = -(-(int(ends[-1]) + 2 * BLOCKSIZE) // RECORDSIZE)
    first = int(table.columns.checksums[is_there][order[0]])
    return (
        bool(starts[0] == 0 and (starts[1:] == ends[:-1]).all())
        and records * RECORDSIZE == table.identity[0]
        and zlib.crc32(head) == first
    )


def build_table(path: Path) -> ShardTable:
    """Return the table of the shard at `path`, from the headers of its tar and of its arrays."""
    identity = identity_of_path(path)
    samples = index_tar(path)
    extensions = list(dict.fromkeys([*samples[0].spans, *TEXT_KEYS])) if samples else []
    if len(extensions) > MOST_MEMBERS:
        raise UserError(f"{path}: sample {samples[0].key!r} has {len(samples[0].spans)} members; no set has so many")
    numbers = {extension: number for number, extension in enumerate(extensions)}
    shape = len(samples), len(extensions)
    offsets, sizes = np.full(shape, -1, np.int64), np.full(shape, -1, np.int32)
    checksums, arrays = np.zeros(shape, np.uint32), np.full(shape, -1, np.int32)
    has_sizes = np.zeros((len(samples), len(SIZES)), np.uint8)
    kinds: dict[Kind, int] = {}
    with open_spans(path, identity) as read:
        for row, sample in enumerate(samples):
            for extension, column in numbers.items():
                if extension not in sample.spans:
                    continue
                offset, size = sample.spans[extension]
                offsets[row, column], sizes[row, column] = offset, size
                checksums[row, column] = sample.checksums[extension]
                kind = _kind(read, extension, offset, size)
                if kind is not None:
                    arrays[row, column] = kinds.setdefault(kind, len(kinds))
            if ORIGIN in sample.spans:
                has_sizes[row] = _entries(read, *sample.spans[ORIGIN])
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in samples]
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    columns = Columns(np.frombuffer(b"".join(keys), np.uint8), ends, offsets, sizes, checksums, arrays, has_sizes)
    return ShardTable(path, identity, extensions, list(kinds), columns)


def _kind(read: Read, extension: str, offset: int, size: int) -> Kind | None:
    """Return shape and dtype of a member, or None if it is not an array of numbers."""
    if not extension.endswith(_ARRAY):
        return None
    try:
        start = read(offset, min(size, npy.HEADER_BYTES), "")
        header = npy.read_header(start, size, "", number_types(extension.removesuffix(_ARRAY)))
    except UserError:  # raised again, with the name of the member, where the member is read
        return None
    return header.shape, header.dtype.name


def _entries(read: Read, offset: int, size: int) -> list[bool]:
    """Return, per entry of `SIZES`, True if the sample's `json` has a valid one."""
    data = read(offset, size, "")
    if not any(entry.encode() in data for entry in SIZES):  # as in sets of families without sizes
        return [False] * len(SIZES)
    found = []
    for entry in SIZES:
        try:
            decode_member(entry, data, "")
            found.append(True)
        except UserError:
            found.append(False)
    return found
