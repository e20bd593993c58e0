"""Table of the samples of a shard: their keys, and place, size and shape of each member, as arrays.

Building a table walks the headers of the tar, 0.2 ms per sample. Tables of large shards are therefore kept in the file
`.members.safetensors` of their folder, and memory-mapped from there. Data workers share its pages. The tar remains the
authority: a table is used only while the size and modification time of its shard are the same, and the reader compares
the tar header of each member that it reads.

For the shards in order, N samples in all, with M kinds of members, the file holds

    keys            all sample keys in UTF-8, one after the other
    key_ends        int64 (N,): end of each key in `keys`
    offsets, sizes  int64, int32 (N, M): place of each member in its tar, in bytes; -1 for a missing member
    checksums       uint32 (N, M): CRC-32 of the tar header before each member
    arrays          int32 (N, M): number of the member's shape and type in `kinds`; -1 if it is no array of numbers
    has_sizes       uint8 (N, S): 1 where the sample's `json` has the entry of `SIZES`

and in its metadata, as JSON, `extensions` (M), `kinds` (shape and dtype), and `shards` (name, bytes, modification time
in ns, number of samples). The kinds of members are those of a shard's first sample, and the optional ones. Each sample
must have the members that are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ldm.checkpoint import open_checkpoint, save_state_dict
from ldm.files import MOST_IN_MEMBER, open_file, read_span
from ldm.identity import Identity, check_identity, identity_of_path
from ldm.shards import npy
from ldm.shards.members import decode_member
from ldm.shards.sample import ORIGIN, SIZES, TEXT_KEYS, number_types
from ldm.shards.tar import TarSample, index_tar
from ldm.util import UserError

logger = logging.getLogger(__name__)

TABLES = ".members.safetensors"
LEAST_SAMPLES = 256  # of a shard whose table is kept; smaller ones are built in 50 ms
_VERSION = "1"
_MOST_MEMBERS = 64  # kinds of members; a table has a column for each
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


_TYPES = ("uint8", "int64", "int64", "int32", "uint32", "int32", "uint8")  # of the columns, in order


class Place(NamedTuple):
    """Place of a member in its tar, CRC-32 of its tar header, and number of its kind; -1 for none."""

    offset: int
    size: int
    checksum: int
    kind: int


@dataclass(frozen=True)
class ShardTable:
    """Table of the shard at `path`, of the file `identity`."""

    path: Path
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

    def members(self, row: int) -> list[Place]:
        """Return the members of a sample, by column."""
        columns = self.columns
        parts = columns.offsets, columns.sizes, columns.checksums, columns.arrays
        return list(map(Place, *(part[row].tolist() for part in parts)))

    def column(self, extension: str) -> int | None:
        """Return the number of the column of a kind of member, or None."""
        return self.extensions.index(extension) if extension in self.extensions else None


def open_tables(paths: Sequence[Path]) -> Iterator[ShardTable]:
    """Yield the tables of `paths`, in order. They are built where none is kept, and kept for the next time.

    Raises:
        UserError: a shard is missing or damaged; see `index_tar`.
    """
    kept = {folder: _read_tables(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    built: dict[Path, list[ShardTable]] = {folder: [] for folder in kept}
    for path in paths:
        identity = identity_of_path(path)
        table = kept[path.parent].get(path.name)
        if table is None or table.identity[:2] != identity[:2]:
            table = build_table(path)
            if len(table) >= LEAST_SAMPLES:
                built[path.parent].append(table)
        yield ShardTable(path, identity, table.extensions, table.kinds, table.columns)
    for folder, tables in built.items():
        if tables:
            names = {table.path.name for table in tables}
            lasting = [table for name, table in kept[folder].items() if name not in names and _is_current(table)]
            _write_tables(folder, [*lasting, *tables])


def keep_tables(paths: Sequence[Path]) -> None:
    """Keep the tables of newly written shards, so that the first start is as quick as the next ones."""
    for _ in open_tables(paths):
        pass


def _is_current(table: ShardTable) -> bool:
    return identity_of_path(table.path)[:2] == table.identity[:2]


def build_table(path: Path) -> ShardTable:
    """Return the table of the shard at `path`, from the headers of its tar and of its arrays."""
    identity = identity_of_path(path)
    samples = index_tar(path)
    extensions = list(dict.fromkeys([*samples[0].spans, *TEXT_KEYS])) if samples else []
    if len(extensions) > _MOST_MEMBERS:
        raise UserError(f"{path}: sample {samples[0].key!r} has {len(samples[0].spans)} members; no set has so many")
    numbers = {extension: number for number, extension in enumerate(extensions)}
    shape = len(samples), len(extensions)
    offsets, sizes = np.full(shape, -1, np.int64), np.full(shape, -1, np.int32)
    checksums, arrays = np.zeros(shape, np.uint32), np.full(shape, -1, np.int32)
    has_sizes = np.zeros((len(samples), len(SIZES)), np.uint8)
    kinds: dict[Kind, int] = {}
    with open_file(path) as file:
        check_identity(file.fileno(), path, identity)
        for row, sample in enumerate(samples):
            for extension, column in numbers.items():
                if extension not in sample.spans:
                    continue
                offset, size = sample.spans[extension]
                offsets[row, column], sizes[row, column] = offset, size
                checksums[row, column] = sample.checksums[extension]
                kind = _kind(file.fileno(), extension, offset, size)
                if kind is not None:
                    arrays[row, column] = kinds.setdefault(kind, len(kinds))
            if ORIGIN in sample.spans:
                has_sizes[row] = _entries(file.fileno(), *sample.spans[ORIGIN])
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in samples]
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    columns = Columns(np.frombuffer(b"".join(keys), np.uint8), ends, offsets, sizes, checksums, arrays, has_sizes)
    return ShardTable(path, identity, extensions, list(kinds), columns)


def _kind(descriptor: int, extension: str, offset: int, size: int) -> Kind | None:
    """Return shape and dtype of a member, or None if it is not an array of numbers."""
    if not extension.endswith(_ARRAY):
        return None
    try:
        start = read_span(descriptor, offset, min(size, npy.HEADER_BYTES), "")
        header = npy.read_header(start, size, "", number_types(extension.removesuffix(_ARRAY)))
    except UserError:  # raised again, with the name of the member, where the member is read
        return None
    return header.shape, header.dtype.name


def _entries(descriptor: int, offset: int, size: int) -> list[bool]:
    """Return, per entry of `SIZES`, True if the sample's `json` has a valid one."""
    data = read_span(descriptor, offset, size, "")
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


def _write_tables(folder: Path, tables: Sequence[ShardTable]) -> None:
    """Keep `tables` in their folder. A folder that cannot be written to keeps none."""
    extensions = list(dict.fromkeys(extension for table in tables for extension in table.extensions))
    kinds = list(dict.fromkeys(kind for table in tables for kind in table.kinds))
    if len(extensions) > _MOST_MEMBERS:  # shards of several sets
        return
    aligned = [_aligned(table, extensions, kinds) for table in tables]
    starts = np.cumsum([0, *(len(columns.keys) for columns in aligned)])
    parts = {field.name: [np.asarray(getattr(columns, field.name)) for columns in aligned] for field in fields(Columns)}
    parts["key_ends"] = [ends + start for ends, start in zip(parts["key_ends"], starts, strict=False)]
    tensors = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
    shards = [[table.path.name, *table.identity[:2], len(table)] for table in tables]
    described = {"version": _VERSION, "extensions": extensions, "kinds": kinds, "shards": shards}
    metadata = {key: json.dumps(value) for key, value in described.items()}
    with suppress(OSError):
        save_state_dict(tensors, folder / TABLES, metadata=metadata)
        logger.info("wrote %s: the places of %d samples, for a quick start", folder / TABLES, len(tensors["offsets"]))


def _aligned(table: ShardTable, extensions: Sequence[str], kinds: Sequence[Kind]) -> Columns:
    """Return the columns of `table` in the order of `extensions`, with the numbers of `kinds`."""
    columns = table.columns
    order = [table.column(extension) for extension in extensions]
    numbers = np.array([*(kinds.index(kind) for kind in table.kinds), -1], np.int32)  # the last one for -1

    def moved(values: np.ndarray, missing: int) -> np.ndarray:
        result = np.full((len(table), len(extensions)), missing, values.dtype)
        for new, old in enumerate(order):
            if old is not None:
                result[:, new] = values[:, old]
        return result

    return Columns(
        columns.keys,
        columns.key_ends,
        moved(columns.offsets, -1),
        moved(columns.sizes, -1),
        moved(columns.checksums, 0),
        numbers[moved(columns.arrays, -1)],
        columns.has_sizes,
    )


def _read_tables(folder: Path) -> dict[str, ShardTable]:
    """Return the tables kept in `folder`, by the name of the shard. A damaged file counts as none."""
    path = folder / TABLES
    if not path.is_file():
        return {}
    try:
        opened = open_checkpoint(path)
        return _tables_in(folder, opened.content["state_dict"], opened.metadata)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s: not readable (%s); it is made again", path, " ".join(str(error).split())[:200])
        return {}


def _tables_in(folder: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, ShardTable]:
    about = {key: json.loads(metadata[key]) for key in ("version", "extensions", "kinds", "shards")}
    if about["version"] != _VERSION:
        return {}
    extensions = [str(extension) for extension in about["extensions"]]
    kinds = [(tuple(map(int, shape)), str(dtype)) for shape, dtype in about["kinds"]]
    whole = Columns(*(tensors[field.name].numpy() for field in fields(Columns)))
    shards = [(str(name), int(size), int(time), int(count)) for name, size, time, count in about["shards"]]
    _check_columns(whole, sum(count for *_, count in shards), len(extensions), len(kinds))
    tables, first = {}, 0
    for name, size, time, count in shards:
        rows = slice(first, first + count)
        start = int(whole.key_ends[first - 1]) if first else 0
        stop = int(whole.key_ends[first + count - 1]) if count else start
        parts = {field.name: getattr(whole, field.name)[rows] for field in fields(Columns)}
        parts |= {"keys": whole.keys[start:stop], "key_ends": parts["key_ends"] - start}
        tables[name] = ShardTable(folder / name, (size, time, 0), extensions, kinds, Columns(**parts))
        first += count
    return tables


def _check_columns(whole: Columns, samples: int, members: int, kinds: int) -> None:
    """Raise `ValueError` unless the columns have their types and shapes, and refer to what exists."""
    shapes = [(len(whole.keys),), (samples,), *[(samples, members)] * 4, (samples, len(SIZES))]
    for field, dtype, shape in zip(fields(Columns), _TYPES, shapes, strict=True):
        values = getattr(whole, field.name)
        if (values.dtype.name, values.shape) != (dtype, shape):
            raise ValueError(f"{field.name} is {values.dtype} {values.shape} instead of {dtype} {shape}")
    ends = whole.key_ends
    is_whole = not samples or (ends[0] >= 0 and ends[-1] == len(whole.keys) and (np.diff(ends) >= 0).all())
    in_range = not samples or (whole.arrays.max() < kinds and whole.sizes.max() <= MOST_IN_MEMBER)
    if not (is_whole and in_range):
        raise ValueError("its entries contradict each other")
